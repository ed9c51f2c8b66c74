"""Runs that gave no loss: one is noted and the sweep goes on, many in a row are no accident."""

from __future__ import annotations

from mutransfer.errors import RequestError
from mutransfer.proxies.training import Outcome

__all__ = ["Failures", "needed"]


class Failures:
    """Counts the failures in a row of a sweep that has ``capacity`` runs at a time.

    As many as run at once, and two more, may fail together of one passing cause. As long as nothing has ever finished
    there is no reason to believe in a passing one: a script that cannot work should not be run all night.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.in_a_row = 0

    def note(self, number: int, outcome: Outcome, finished: int) -> None:
        """Count trial ``number``; ``finished`` is how many the study has.

        Raises:
            RequestError: enough have failed.
        """
        self.in_a_row = self.in_a_row + 1 if outcome.failed else 0
        if self.in_a_row < (self.capacity + 2 if finished else min(self.capacity, 2)) or not outcome.failed:
            return
        if finished:
            raise RequestError(
                f"{self.in_a_row} trials in a row failed, the last, trial {number}, because {outcome.failed}: mend that and run "
                "the same command again; what was finished is kept."
            )
        raise RequestError(
            f"trial {number} failed because {outcome.failed}, and none has finished yet: mend that and run the same command "
            "again."
        )


def needed(outcome: Outcome, what: str) -> Outcome:
    """Return ``outcome`` of ``what``, a run that no other can stand in for.

    Raises:
        RequestError: it failed.
    """
    if outcome.failed:
        raise RequestError(
            f"{what} failed because {outcome.failed}: mend that and run the same command again; what was finished is kept."
        )
    return outcome
