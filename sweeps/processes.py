"""Jobs side by side in processes: small models do not use two cores well."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import resource_tracker

import torch

from mutransfer.proxies.training import Outcome

from .experiment import Experiment
from .jobs import Job, Report, do

__all__ = ["Processes"]


class Processes:
    """Jobs side by side in ``count`` single-threaded processes on the CPU: small models do not use two cores well."""

    def __init__(self, count: int) -> None:
        self.capacity = count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Processes:
        # A forked torch may deadlock in its thread pool, so the processes start afresh.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(self.capacity, mp_context=context, initializer=_quiet)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._pool is not None
        for process in list((self._pool._processes or {}).values()):
            process.terminate()  # nothing that is still running is wanted any more
        self._pool.shutdown(wait=True, cancel_futures=True)

    def run(
        self, experiment: Experiment, jobs: Iterable[Job], report: Report | None = None
    ) -> Iterator[tuple[Job, Outcome]]:
        """See `Executor.run`; reports do not cross processes, so jobs run to their end."""
        assert self._pool is not None, "use as a context manager"
        source = iter(jobs)
        running: dict[Future[Outcome], Job] = {}
        while True:
            with _interrupts_held():
                for job in itertools.islice(source, self.capacity - len(running)):
                    running[self._pool.submit(do, experiment, job, "cpu", None)] = job
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Let Ctrl-C wait while processes start: they inherit the mask, so it does not reach them before `_quiet` does."""
    resource_tracker.ensure_running()  # starting it inside would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _quiet() -> None:
    """Leave Ctrl-C to the parent, end with it, and leave the other cores to the other processes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed parent closes no queue: its processes would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
