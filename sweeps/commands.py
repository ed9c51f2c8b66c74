"""An own trainer that is a command: run with a trial's settings, heard on its stdout, and ended when it is pruned or late."""

from __future__ import annotations

import os
import select
import shlex
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from mutransfer.errors import RequestError
from mutransfer.export import export
from mutransfer.files import naming_the_disk, write_text
from mutransfer.plans import Plan
from mutransfer.proxies.training import Outcome
from mutransfer.transfer import TargetConfig

from .attempt import Attempt
from .experiment import Experiment
from .jobs import Job, Report, alone, plan_of
from .processes import ending
from .told import told
from .trainers import Trainer
from .wards import Ward

__all__ = ["Commands", "check_command"]

LOOK_EVERY = 0.05  # seconds between looks at commands that say nothing


def check_command(trainer: Trainer) -> None:
    """Raise a RequestError if the program of ``trainer``'s command is not there."""
    program = shlex.split(str(trainer.command))[0]
    if "{" not in program and shutil.which(program) is None:
        raise RequestError(
            f"trainer.command begins with {program!r}, which is no program here: check its name and PATH; a script is run by "
            "its interpreter, as in python train.py."
        )


class Commands:
    """Jobs as runs of the experiment's ``trainer.command``, ``count`` at once.

    Each job has a folder below ``folder``/trials: recipe.json and plan.json (docs/own-trainer.md), out (empty when the job
    begins; a further try finds what the last one left), stdout.log with the lines that tell no loss, and stderr.log.
    """

    def __init__(self, folder: Path, count: int = 1) -> None:
        self.folder, self.capacity = folder, count

    def run(
        self, experiment: Experiment, jobs: Iterable[Job], report: Report | None = None
    ) -> Iterator[tuple[Job, Outcome]]:
        """See `Executor.run`; whatever ends it early ends the commands at work."""
        source, running = iter(jobs), dict[int, _Run]()
        try:
            while True:
                for job in islice(source, self.capacity - len(running)):
                    slot = min(set(range(self.capacity)) - running.keys())
                    ask = None if report is None else alone(report, job)
                    attempt = Attempt(experiment.steps, job.rungs, ask, maximize=experiment.maximize)
                    running[slot] = _Run(experiment, job, attempt, self._home(job), slot, self._environment())
                if not running:
                    return
                ends = [end for run in running.values() if (end := run.ward.readable) is not None]
                select.select(ends, [], [], LOOK_EVERY)
                for slot, run in list(running.items()):
                    if (outcome := run.advance()) is not None:
                        del running[slot]
                        yield run.job, outcome
        finally:
            for run in running.values():
                run.ward.stop()  # all at once, before waiting for any
            for run in running.values():
                run.ward.close()

    def _home(self, job: Job) -> Path:
        key = job.key if isinstance(job.key, tuple) else (job.key,)
        return self.folder / "trials" / "_".join(map(str, key))

    def _environment(self) -> dict[str, str]:
        """Reports are to come when they are printed, and commands side by side to share the cores."""
        share = max(1, len(os.sched_getaffinity(0)) // self.capacity)
        threads = {} if self.capacity == 1 else {"OMP_NUM_THREADS": str(share)}
        return {"PYTHONUNBUFFERED": "1", **threads, **os.environ}


class _Run:
    """A job's command, over all its tries."""

    def __init__(
        self, experiment: Experiment, job: Job, attempt: Attempt, home: Path, slot: int, environment: dict[str, str]
    ) -> None:
        assert experiment.trainer is not None
        self.job, self.attempt, self.home = job, attempt, home
        self.trainer, self.environment = experiment.trainer, environment
        with naming_the_disk(home):
            shutil.rmtree(
                home / "out", ignore_errors=True
            )  # of another job of that name, whose checkpoint is not this one's
            (home / "out").mkdir(parents=True)
        plan = plan_of(experiment, job.scale, job.parametrization, job.recipe)
        files = {"recipe": job.recipe.save(home / "recipe.json"), "plan": _save_plan(experiment, plan, job, home)}
        # Whole paths: a launcher may start the script in another folder.
        paths = {name: str(path.absolute()) for name, path in {**files, "out": home / "out"}.items()}
        self.words = self.trainer.words({**paths, "seed": str(job.seed), "slot": str(slot)})
        self.tries = 0
        self._start()

    def _start(self) -> None:
        self.tries += 1
        self.final: float | None = None
        self.late, self.stopping = False, False
        self.begun = time.monotonic()
        self.ward = Ward(self.words, self.home / "stderr.log", self.trainer.grace, self.environment)

    def advance(self) -> Outcome | None:
        """Take in what the command has said and done; return its outcome once it has ended for good."""
        code = self.ward.code  # before reading: what an ended command has said is all there
        with naming_the_disk(self.home), (self.home / "stdout.log").open("ab") as log:
            for line in self.ward.lines():
                if not self._heard(line):
                    log.write(line + b"\n")
        if self.trainer.timeout is not None and time.monotonic() - self.begun > self.trainer.timeout:
            self.late = True
            self._stop()
        if code is None:
            return None
        self.ward.close()
        return self._ended(code)

    def _heard(self, line: bytes) -> bool:
        """Take in a line, and return whether it told a loss; after a stop, and after the final loss, none counts."""
        if (found := told(line)) is None:
            return False
        if self.stopping or self.final is not None:
            return True
        if found.step is not None and self.attempt.heard(found.step, found.loss) and not found.final:
            self._stop()
        elif found.step is None:
            self.attempt.note(found.loss)
        if found.final:
            self.final = found.loss
        return True

    def _stop(self) -> None:
        if not self.stopping:
            self.stopping = True
            self.ward.stop()

    def _ended(self, code: int) -> Outcome | None:
        if self.final is not None:  # whatever happened while it cleaned up
            return self.attempt.outcome(self.final)
        if self.attempt.stopped or self.attempt.diverged:
            return self.attempt.outcome()
        said = self.ward.last_words()
        where = f"{f'saying {said!r}; ' if said else ''}see {self.home}"
        if self.late:
            return self.attempt.outcome(
                failed=f"the trainer's command took longer than {self.trainer.timeout:g} s ({where})"
            )
        if code == 0:
            if (last := self.attempt.last) is None:
                raise RequestError(
                    f"the trainer's command ended without a loss ({where}): let it print JSON lines such as "
                    '{"step": 100, "loss": 2.3} on its stdout.'
                )
            return self.attempt.outcome(last)
        if self.tries <= self.trainer.retries:
            self.attempt.again()
            self._start()
            return None
        each = f" in each of {self.tries} tries" if self.tries > 1 else ""
        return self.attempt.outcome(failed=f"the trainer's command {ending(code)}{each} ({where})")


def _save_plan(experiment: Experiment, plan: Plan, job: Job, home: Path) -> Path:
    """Write the settings per parameter as `mutransfer transfer --to pytorch` writes the target's."""
    settings: dict[str, Any] = experiment.model_dump(
        include={"model", "options", "data", "sequence_length", "batch_size", "steps"}
    )
    target = TargetConfig(plan=plan, seed=job.seed, provenance={}, warnings=(), **settings)
    target = replace(target, plan=replace(plan, scale=plan.scale.with_(batch=target.batch_size, tokens=target.tokens)))
    return write_text(home / "plan.json", export(target, "pytorch")[1])
