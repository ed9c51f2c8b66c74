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
from mutransfer.io import naming_the_disk, write_text
from mutransfer.planning.target import TargetConfig
from mutransfer.proxies.training import Outcome

from .attempt import Attempt
from .experiment import Experiment
from .jobs import Job, Report, alone, plan_of
from .processes import ending
from .told import told
from .trainers import Trainer
from .wards import Ward

__all__ = ["CommandRun", "Commands", "check_command", "environment", "look"]

LOOK_EVERY = 0.05  # seconds between looks at commands that say nothing


def check_command(trainer: Trainer, folder: str | None = None) -> None:
    """Raise a RequestError if the program of ``trainer``'s command, which runs in ``folder``, is not there."""
    program = shlex.split(str(trainer.command))[0]
    if "{" not in program and shutil.which(os.path.join(folder or "", program) if "/" in program else program) is None:
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
        assert experiment.trainer is not None
        source, running = iter(jobs), dict[int, tuple[Job, CommandRun]]()
        try:
            while True:
                for job in islice(source, self.capacity - len(running)):
                    slot = min(set(range(self.capacity)) - running.keys())
                    ask = None if report is None else alone(report, job)
                    attempt = Attempt(experiment.steps, job.rungs, ask, maximize=experiment.maximize)
                    home = self._home(job)
                    # Of another job of that name, whose checkpoint is not this one's.
                    shutil.rmtree(home / "out", ignore_errors=True)
                    running[slot] = job, CommandRun(
                        experiment.trainer, _target(experiment, job), attempt, home, experiment.folder, slot=slot,
                        environment=environment(self.capacity),
                    )  # fmt: skip
                if not running:
                    return
                look(run for _, run in running.values())
                for slot, (job, run) in list(running.items()):
                    if (outcome := run.advance()) is not None:
                        del running[slot]
                        yield job, outcome
        finally:
            for _, run in running.values():
                run.ward.stop()  # all at once, before waiting for any
            for _, run in running.values():
                run.ward.close()

    def _home(self, job: Job) -> Path:
        key = job.key if isinstance(job.key, tuple) else (job.key,)
        return self.folder / "trials" / "_".join(map(str, key))


def environment(side_by_side: int = 1) -> dict[str, str]:
    """Return a command's environment: reports are to come when they are printed, and commands to share the cores."""
    share = max(1, len(os.sched_getaffinity(0)) // side_by_side)
    threads = {} if side_by_side == 1 else {"OMP_NUM_THREADS": str(share)}
    return {"PYTHONUNBUFFERED": "1", **threads, **os.environ}


def look(runs: Iterable[CommandRun]) -> None:
    """Wait until one of ``runs`` says something, or for a moment."""
    select.select([end for run in runs if (end := run.ward.readable) is not None], [], [], LOOK_EVERY)


class CommandRun:
    """A trainer's command at work on ``target``, over all its tries.

    ``home`` holds its files, recipe.json and plan.json among them, and its folder out; ``folder`` is where it runs.
    """

    def __init__(
        self, trainer: Trainer, target: TargetConfig, attempt: Attempt, home: Path, folder: str | None, *, slot: int = 0,
        environment: dict[str, str],
    ) -> None:  # fmt: skip
        self.attempt, self.home, self.folder = attempt, home, folder
        self.trainer, self.environment = trainer, environment
        with naming_the_disk(home):
            (home / "out").mkdir(parents=True, exist_ok=True)
        files = {
            "recipe": target.plan.recipe.save(home / "recipe.json"),
            "plan": write_text(home / "plan.json", export(target, "pytorch")[1]),
        }
        # Whole paths: a launcher may start the script in another folder.
        paths = {name: str(path.absolute()) for name, path in {**files, "out": home / "out"}.items()}
        self.words = self.trainer.words({**paths, "seed": str(target.seed), "slot": str(slot)})
        self.tries = 0
        self._start()

    def _start(self) -> None:
        self.tries += 1
        self.final: float | None = None
        self.late, self.stopping = False, False
        self.begun = time.monotonic()
        self.ward = Ward(self.words, self.home / "stderr.log", self.trainer.grace, self.environment, self.folder)

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


def _target(experiment: Experiment, job: Job) -> TargetConfig:
    """Return the settings of a trial as `mutransfer transfer` makes the target's."""
    plan = plan_of(experiment, job.scale, job.parametrization, job.recipe)
    settings: dict[str, Any] = experiment.model_dump(
        include={"model", "options", "data", "sequence_length", "batch_size", "steps"}
    )
    target = TargetConfig(plan=plan, seed=job.seed, provenance={}, warnings=(), **settings)
    return replace(target, plan=replace(plan, scale=plan.scale.with_(batch=target.batch_size, tokens=target.tokens)))
