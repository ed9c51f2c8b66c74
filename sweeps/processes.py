"""Run jobs in parallel processes: a single training of a small model does not use two cores well."""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from typing import Any

import torch

from mutransfer.devices import keep_freed_memory
from mutransfer.printing import in_worker
from mutransfer.proxies.training import Outcome

from .experiment import Experiment
from .jobs import Done, Events, Executor, Job, Report, Reports, RunContext, Session, do

__all__ = ["ProcessExecutor", "Worker", "ending"]

PATIENCE = 5.0  # seconds between asking a process to end and killing it


@dataclass
class Worker:
    """A process, the parent's end of its pipe, and the job that it has been running since ``begun``."""

    process: SpawnProcess
    pipe: Connection
    job: Job | None = None
    begun: float = 0.0


class ProcessExecutor(Executor):
    """Executor that runs jobs in ``count`` parallel single-threaded processes on the CPU; use it as a context manager.

    If a process dies (out of memory, a crash inside a library), only its job is lost, and its outcome is ``failed``; a new
    process is started for the next job.

    Attributes:
        workers: the processes that run now, each with its job.
    """

    def __init__(self, count: int, *, compile: bool = False) -> None:
        self._count, self.compile = count, compile
        self.workers: list[Worker] = []
        self._open = False

    @property
    def capacity(self) -> int:
        """See `Executor`."""
        return self._count

    def __enter__(self) -> ProcessExecutor:
        self._open = True
        return self

    def __exit__(self, *_: object) -> None:
        self._open = False
        self._end(list(self.workers))

    def events(self, session: Session) -> Events:
        """See `Executor`."""
        assert self._open, "use as a context manager"
        try:
            while True:
                for job in (yield from session.take(self.capacity - len(self._running()))):
                    self._begin(session.experiment, job)
                if not (running := self._running()):
                    return
                # Wait for the processes too: one that dies may leave its end of the pipe open in a child process.
                ready = set(connection.wait([end for w in running for end in (w.pipe, w.process.sentinel)]))
                for worker in running:
                    if ready & {worker.pipe, worker.process.sentinel}:
                        yield from self._handle(worker, session)
        finally:
            self._end(self._running())  # their outcomes are no longer needed

    def _running(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.job is not None]

    def _begin(self, experiment: Experiment, job: Job) -> None:
        for worker in [worker for worker in self.workers if worker.job is None]:
            with contextlib.suppress(OSError):  # the process died while idle
                worker.pipe.send((experiment, job))
                worker.job, worker.begun = job, time.perf_counter()
                return
            self._end([worker])
        worker = self._started()
        worker.job, worker.begun = job, time.perf_counter()
        with contextlib.suppress(OSError):  # the process died at its start: `events` notices when it waits for it
            worker.pipe.send((experiment, job))

    def _started(self) -> Worker:
        # Spawn the processes: a forked torch may deadlock in its thread pool.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.compile))
        with _interrupts_held():
            process.start()
            self.workers.append(worker := Worker(process, ours))
        theirs.close()
        return worker

    def _handle(self, worker: Worker, session: Session) -> Events:
        """Yield the event of a worker's message or death, and answer a report."""
        job = worker.job
        assert job is not None
        message: tuple[str, Any] = "died", None
        with contextlib.suppress(
            EOFError, OSError, pickle.UnpicklingError
        ):  # the process was killed while sending a message
            if worker.pipe.poll():
                message = worker.pipe.recv()
        match message:
            case ("report", (step, loss)):
                yield Reports((Report(job, step, loss),))
                with contextlib.suppress(OSError):
                    worker.pipe.send(session.is_stopped(job.key))
            case ("done", outcome):
                worker.job = None
                yield Done(job, outcome)
            case ("raised", error):
                worker.job = None
                raise error
            case _:
                seconds = time.perf_counter() - worker.begun
                self._end([worker])
                reason = f"its process {ending(worker.process.exitcode or 0)}"
                yield Done(job, Outcome(math.nan, math.nan, 0, False, seconds, reason))

    def _end(self, workers: list[Worker]) -> None:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join(PATIENCE)
            if worker.process.exitcode is None:
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()
            self.workers.remove(worker)


def ending(code: int) -> str:
    """Describe how a process ended by its exit code, which for a signal is negative, or above 128 as in a shell."""
    number = -code if code < 0 else code - 128
    names = {member.value: member.name for member in signal.Signals}
    if number not in names:
        return f"ended with code {code}"
    hint = " (often: the machine is out of memory)" if number == signal.SIGKILL else ""
    return f"was killed by {names[number]}{hint}"


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Block Ctrl-C while processes start: they inherit the mask, so it cannot reach them before `_quiet` ignores it."""
    resource_tracker.ensure_running()  # starting it inside the block would lift the mask
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(pipe: Connection, compile: bool) -> None:
    """Run the jobs received through ``pipe`` until it is closed; the entry point of a process."""
    _quiet()
    in_worker()

    def report(step: int, loss: float) -> bool:
        pipe.send(("report", (step, loss)))
        return pipe.recv()

    context: RunContext | None = None
    while True:
        try:
            experiment, job = pipe.recv()
        except EOFError:
            return
        context = RunContext(experiment) if context is None else context.for_(experiment)
        message: tuple[str, Any]
        try:
            message = "done", do(context, job, "cpu", report, compile)
        except Exception as error:
            message = "raised", _portable(error)
        pipe.send(message)


def _portable(error: Exception) -> Exception:
    """Return ``error`` with its traceback as a note, or its text in a RuntimeError if it cannot be pickled."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error


def _quiet() -> None:
    """Ignore Ctrl-C, which the parent handles, use one thread, keep freed memory, and end when the parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    keep_freed_memory()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit when the parent process has ended: if it was killed, this process would train for nothing."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
