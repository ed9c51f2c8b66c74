"""Telling a dead worker from a busy one: who shows no sign of life for as long as its own lease has let its trials go.

A sign of life is a number in the study that its worker counts up, from a thread, whatever it trains. Others judge by how long
*they* have seen it stand still, so machines need not agree on the time. Time in which nothing could be seen (the server was
away, or this process was stopped) does not count, as the others could not show a sign either.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from types import TracebackType
from typing import Any

import optuna
from optuna.trial import FrozenTrial, TrialState

from .claims import OWNER

__all__ = ["LEASE", "Leases", "worker_name"]

LEASE = 60.0  # seconds without a sign of life
SIGN = "mutransfer:sign:"  # of a study's attribute: a worker's [count, lease]
SIGNS = 6  # per lease


def worker_name() -> str:
    """Return a name for this process that no other worker has, on any machine."""
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


class Leases:
    """Shows that ``owner`` lives, and watches the others, for as long as it is entered.

    Args:
        study: the shared study.
        owner: this worker's name.
        seconds: its lease.
    """

    def __init__(self, study: optuna.Study, owner: str, seconds: float = LEASE) -> None:
        self._storage, self._study_id = study._storage, study._study_id
        self.owner, self.seconds = owner, seconds
        self._count = 0
        self._watched = -float("inf")
        self._lapsed: list[FrozenTrial] = []
        self._seen: dict[int, tuple[Any, float]] = {}  # trial number → its owner's sign, and since when it is that
        self._owners: dict[str, tuple[Any, float]] = {}  # the same of owners that are asked for
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name="mutransfer-lease", daemon=True)

    def __enter__(self) -> Leases:
        self._show()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join(timeout=1.0)  # it may be waiting for a server, and ends with the process

    def lapsed(self) -> list[FrozenTrial]:
        """Return the running trials whose workers were last seen to be dead."""
        return self._lapsed

    def silent(self, owner: str) -> bool:
        """Return whether a worker has shown no sign of life for its lease, as far as these questions have been asked."""
        sign = self._storage.get_study_system_attrs(self._study_id).get(f"{SIGN}{owner}")
        now = time.monotonic()
        before, since = self._owners.get(owner, (None, now))
        self._owners[owner] = sign, (since if before == sign else now)
        return now - self._owners[owner][1] > (sign[1] if sign else self.seconds)

    def _live(self) -> None:
        while not self._ended.wait(self.seconds / SIGNS):
            try:
                self._show()
                self.watch()
            except Exception:
                # What is wrong with the storage is met, and told, by the sweep itself; a sign that is late is not.
                self._lapsed = []

    def _show(self) -> None:
        self._count += 1
        self._storage.set_study_system_attr(self._study_id, f"{SIGN}{self.owner}", [self._count, self.seconds])

    def watch(self) -> None:
        """Look at all running trials' owners."""
        attributes = self._storage.get_study_system_attrs(self._study_id)
        running = self._storage.get_all_trials(self._study_id, deepcopy=False, states=(TrialState.RUNNING,))
        now = time.monotonic()
        if now - self._watched > self.seconds / 2:  # nothing was seen for a while
            self._seen = {}
        self._watched = now
        seen, lapsed = {}, []
        for trial in running:
            owner = trial.system_attrs.get(OWNER)
            if owner == self.owner:
                continue
            sign = (owner, attributes.get(f"{SIGN}{owner}"))
            before, since = self._seen.get(trial.number, (None, now))
            seen[trial.number] = sign, (since if before == sign else now)
            lease = sign[1][1] if sign[1] else self.seconds  # taken from the queue, and not yet signed
            if now - seen[trial.number][1] > lease:
                lapsed.append(trial)
        self._seen, self._lapsed = seen, lapsed
