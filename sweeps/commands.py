"""Train with a user's command: run it with a trial's settings, read its reports from stdout, and end all its processes.

`train_target` runs a user trainer, function or command, with the settings of the target run.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import select
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mutransfer.errors import TrainerError
from mutransfer.export import export
from mutransfer.io import naming_the_disk, write_text
from mutransfer.planning.target import TargetConfig
from mutransfer.proxies.importing import modules_in
from mutransfer.proxies.training import Outcome

from .experiment import Trainer
from .jobs import Done, Events, Executor, Job, Report, Reports, RunContext, Session
from .processes import ending
from .user_trainers import TrialRun, call, load_trainer, needed

__all__ = [
    "CommandRun",
    "Commands",
    "ParsedReport",
    "SupervisedProcess",
    "check_command",
    "command_environment",
    "look",
    "parse_report",
    "train_target",
    "trainer_of",
]


class ParsedReport(NamedTuple):
    """A reported loss with its step (None if not given), and whether it is the final loss."""

    step: int | None
    loss: float
    final: bool


def parse_report(line: bytes) -> ParsedReport | None:
    """Parse a report such as ``{"step": 100, "loss": 2.3}``, with ``"final": true`` for the last; return None for other text.

    A loss of null, NaN or Infinity is not finite. A step is the number of optimizer steps done.
    """
    if not line.lstrip().startswith(b"{"):
        return None
    try:
        report = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(report, dict) or "loss" not in report:
        return None
    loss, step, final = report["loss"], report.get("step"), report.get("final", False)
    loss = math.nan if loss is None else loss
    if not _is_number(loss) or not isinstance(final, bool) or not (step is None or _is_step(step)):
        return None
    return ParsedReport(None if step is None else int(step), float(loss), final)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_step(value: Any) -> bool:
    return _is_number(value) and math.isfinite(value) and value >= 0 and value == int(value)


SUPERVISOR = Path(__file__).with_name("_supervisor.py")
LONGEST = 2**20  # bytes of a line: longer ones are split, as they cannot be reports
TAIL = 4096  # bytes at the end of a command's stderr, where the reason for a failure is


class SupervisedProcess:
    """One run of a command in ``folder`` (default: the current folder); its stderr is appended to the file ``errors``.

    The command runs in a new session, so a Ctrl-C at the terminal does not reach it. It ends when `stop` is called or when this
    process ends for any reason.
    """

    def __init__(
        self, words: Sequence[str], errors: Path, grace: float, environment: dict[str, str], folder: str | None = None
    ) -> None:
        with naming_the_disk(errors), errors.open("ab") as file:
            self._errors, self._before = errors, file.tell()
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", str(SUPERVISOR), str(grace), *words],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file, start_new_session=True, env=environment,
                cwd=folder,
            )  # fmt: skip
        assert self._process.stdout is not None
        self._stdout = self._process.stdout
        os.set_blocking(self._stdout.fileno(), False)
        self._rest = b""

    @property
    def readable(self) -> int | None:
        """The file descriptor to wait for; None once stdout has ended."""
        return None if self._stdout.closed else self._stdout.fileno()

    @property
    def code(self) -> int | None:
        """The exit code, above 128 for a signal; None while any process of the command is alive."""
        return self._process.poll()

    def lines(self) -> Iterator[bytes]:
        """Yield the lines available now, without waiting, and at the end of stdout the text after the last line break."""
        while not self._stdout.closed:
            try:
                read = os.read(self._stdout.fileno(), 2**16)
            except BlockingIOError:
                return
            *whole, self._rest = (self._rest + read).split(b"\n")
            if not read:
                self._stdout.close()
            if self._rest and (not read or len(self._rest) > LONGEST):
                whole, self._rest = [*whole, self._rest], b""
            yield from whole

    def stop(self) -> None:
        """Ask the command to end; it is killed after the grace period."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def close(self) -> None:
        """Stop the command, wait until all its processes have ended, and release its resources."""
        self.stop()
        self._process.wait()
        self._stdout.close()

    def last_words(self) -> str:
        """Return the last lines of stderr, joined to one line."""
        with self._errors.open("rb") as file:
            file.seek(max(self._before, file.seek(0, os.SEEK_END) - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
        # Skip separator lines and empty lines.
        texts = [" ".join(line.split()) for line in lines if any(letter.isalnum() for letter in line)]
        return " / ".join(texts[-2:])[-300:].rstrip(".")


LOOK_EVERY = 0.05  # seconds between checks of commands that print nothing


def check_command(trainer: Trainer, folder: str | None = None) -> None:
    """Raise a TrainerError if the program of ``trainer``'s command, which runs in ``folder``, does not exist."""
    program = shlex.split(str(trainer.command))[0]
    if "{" not in program and shutil.which(os.path.join(folder or "", program) if "/" in program else program) is None:
        raise TrainerError(
            f"trainer.command begins with {program!r}, which was not found: check its name and PATH; run a script with "
            "its interpreter, as in python train.py."
        )


class Commands(Executor):
    """Executor that runs jobs with the experiment's ``trainer.command``, ``count`` at a time.

    Each job has a folder below ``folder``/trials with recipe.json and plan.json (docs/how-to/user-trainer.md), out (empty when
    the job starts; a retry finds the files of the previous attempt), stdout.log with the lines that are not reports, and
    stderr.log.
    """

    def __init__(self, folder: Path, count: int = 1) -> None:
        self.folder, self._count = folder, count

    @property
    def capacity(self) -> int:
        """See `Executor`."""
        return self._count

    def within(self, folder: Path) -> Commands:
        """See `Executor`; jobs of two run folders may have the same keys."""
        return Commands(folder, self._count)

    def events(self, session: Session) -> Events:
        """See `Executor`."""
        running = dict[int, tuple[Job, CommandRun]]()
        try:
            while True:
                for job in (yield from session.take(self.capacity - len(running))):
                    slot = min(set(range(self.capacity)) - running.keys())
                    running[slot] = job, self._begun(session.context, job, slot)
                if not running:
                    return
                look(run for _, run in running.values())
                for slot, (job, run) in list(running.items()):
                    for rung, loss in run.advance():
                        yield Reports((Report(job, rung, loss),))
                        run.attempt.stopped = session.is_stopped(job.key)
                    if run.outcome is not None:
                        del running[slot]
                        yield Done(job, run.outcome)
        finally:
            for _, run in running.values():
                run.process.stop()  # stop all of them before waiting for any
            for _, run in running.values():
                run.process.close()

    def _begun(self, context: RunContext, job: Job, slot: int) -> CommandRun:
        experiment = context.experiment
        assert experiment.trainer is not None
        attempt = TrialRun(experiment.steps, job.rungs, maximize=experiment.maximize)
        home = self._home(job)
        # Left by another job of the same name, whose checkpoint must not be used.
        shutil.rmtree(home / "out", ignore_errors=True)
        return CommandRun(
            experiment.trainer, _target(context, job), attempt, home, experiment.folder, slot=slot,
            environment=command_environment(self.capacity),
        )  # fmt: skip

    def _home(self, job: Job) -> Path:
        key = job.key if isinstance(job.key, tuple) else (job.key,)
        return self.folder / "trials" / "_".join(map(str, key))


def command_environment(side_by_side: int = 1) -> dict[str, str]:
    """Return a command's environment: unbuffered output, so reports arrive at once, and a share of the cores for its threads."""
    share = max(1, len(os.sched_getaffinity(0)) // side_by_side)
    threads = {} if side_by_side == 1 else {"OMP_NUM_THREADS": str(share)}
    return {"PYTHONUNBUFFERED": "1", **threads, **os.environ}


def look(runs: Iterable[CommandRun]) -> None:
    """Wait until one of ``runs`` prints something, for at most `LOOK_EVERY` seconds."""
    select.select([end for run in runs if (end := run.process.readable) is not None], [], [], LOOK_EVERY)


class CommandRun:
    """Run of a trainer's command on ``target``, over all its attempts.

    Args:
        trainer: the trainer with the command.
        target: settings of the run.
        attempt: receives the reports.
        home: folder of the run's files: recipe.json, plan.json, the logs and the folder out.
        folder: working directory of the command.
        slot: number from 0, unique among the commands that run at the same time.
        environment: environment variables of the command.

    Attributes:
        outcome: outcome of the run; None while it goes on.
    """

    def __init__(
        self, trainer: Trainer, target: TargetConfig, attempt: TrialRun, home: Path, folder: str | None, *, slot: int = 0,
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
        # Absolute paths, since a launcher may start the script in another folder.
        paths = {name: str(path.absolute()) for name, path in {**files, "out": home / "out"}.items()}
        self.words = self.trainer.words({**paths, "seed": str(target.seed), "slot": str(slot)})
        self.outcome: Outcome | None = None
        self.tries = 0
        self._start()

    def _start(self) -> None:
        self.tries += 1
        self.final: float | None = None
        self.late, self.stopping = False, False
        self.begun = time.monotonic()
        self.process = SupervisedProcess(
            self.words, self.home / "stderr.log", self.trainer.grace, self.environment, self.folder
        )

    def advance(self) -> Iterator[tuple[int, float]]:
        """Read new output and check the command; set ``outcome`` if it has ended and is not retried.

        Yields (rung, loss) for each report at a rung. If ``attempt.stopped`` is then set, the command is asked to end.
        """
        code = self.process.code  # read it before the output: once the command has ended, its output is complete
        with naming_the_disk(self.home), (self.home / "stdout.log").open("ab") as log:
            for line in self.process.lines():
                if (found := parse_report(line)) is None:
                    log.write(line + b"\n")
                elif not self.stopping and self.final is None:
                    yield from self._record(found)
        if self.trainer.timeout is not None and time.monotonic() - self.begun > self.trainer.timeout:
            self.late = True
            self._stop()
        if code is not None:
            self.process.close()
            self.outcome = self._ended(code)

    def _record(self, found: ParsedReport) -> Iterator[tuple[int, float]]:
        if found.step is None:
            self.attempt.note(found.loss)
        else:
            if (rung := self.attempt.on_report(found.step, found.loss)) is not None:
                yield rung, found.loss
            if self.attempt.over and not found.final:
                self._stop()
        if found.final:
            self.final = found.loss

    def _stop(self) -> None:
        if not self.stopping:
            self.stopping = True
            self.process.stop()

    def _ended(self, code: int) -> Outcome | None:
        if self.final is not None:  # errors during cleanup do not matter
            return self.attempt.outcome(self.final)
        if self.attempt.over:
            return self.attempt.outcome()
        text = self.process.last_words()
        where = f"{f'saying {text!r}; ' if text else ''}see {self.home}"
        if self.late:
            return self.attempt.outcome(
                failed=f"the trainer's command took longer than {self.trainer.timeout:g} s ({where})"
            )
        if code == 0:
            if (last := self.attempt.last) is None:
                raise TrainerError(
                    f"the trainer's command ended without a loss ({where}): let it print JSON lines such as "
                    '{"step": 100, "loss": 2.3} to stdout.'
                )
            return self.attempt.outcome(last)
        if self.tries <= self.trainer.retries:
            self.attempt.again()
            self._start()
            return None
        each = f" in each of {self.tries} tries" if self.tries > 1 else ""
        return self.attempt.outcome(failed=f"the trainer's command {ending(code)}{each} ({where})")


def _target(context: RunContext, job: Job) -> TargetConfig:
    """Return the settings of a trial in the format that `mutransfer transfer` writes for the target."""
    plan = context.plan(job.scale, job.parametrization, job.recipe)
    settings: dict[str, Any] = context.experiment.model_dump(
        include={"model", "options", "data", "sequence_length", "batch_size", "steps"}
    )
    target = TargetConfig(plan=plan, seed=job.seed, provenance={}, warnings=(), **settings)
    return replace(target, plan=replace(plan, scale=plan.scale.with_(batch=target.batch_size, tokens=target.tokens)))


def trainer_of(target: TargetConfig) -> Trainer | None:
    """Return the trainer that the target's recipe was tuned with; None for mutransfer's own loop."""
    settings = target.provenance.get("trainer")
    return None if settings is None else Trainer.read(settings, "the target's trainer")


def train_target(
    target: TargetConfig, out: Path, *, progress: Callable[[int, int], None] = lambda done, total: None
) -> dict[str, Any]:
    """Train ``target`` with the trainer that its recipe was tuned with, at the target's scale.

    A function is called with the tuned recipe, the target's plan, its seed and a ``report`` whose ``steps`` are the target's. A
    command gets recipe.json, plan.json and the folder out below ``out``; files left there by an earlier run are kept, which
    allows the command to resume from its own checkpoint.

    Args:
        target: the target to train.
        out: folder for a command's files.
        progress: called with (steps reported, steps in total).

    Returns:
        ``loss`` (the final loss; None if not finite), ``steps`` (the last one reported, or all steps if the run succeeded), and
        ``tokens_per_second`` and ``checkpoint``, which are None because only the trainer knows them.

    Raises:
        TrainerError: the trainer no longer exists, or it failed.
    """
    trainer = trainer_of(target)
    assert trainer is not None
    references, folder = target.found()
    maximize = target.provenance.get("direction") == "maximize"
    attempt = TrialRun(
        target.steps, on_report=lambda step: progress(min(step, target.steps), target.steps), maximize=maximize
    )
    if trainer.call is not None:
        with modules_in(folder):
            load_trainer(references["call"])
            outcome = call(references["call"], target.plan.recipe, target.plan, target.seed, attempt)
    else:
        check_command(trainer, folder)
        outcome = _run(CommandRun(trainer, target, attempt, out, folder, environment=command_environment()))
    needed(outcome, f"the run of {trainer} at width {target.plan.scale.width}")
    return {
        "loss": outcome.loss if math.isfinite(outcome.loss) else None,
        "steps": outcome.steps,
        "tokens_per_second": None,
        "checkpoint": None,
    }


def _run(run: CommandRun) -> Outcome:
    try:
        while run.outcome is None:
            look([run])
            for _ in run.advance():  # without rungs, there is nothing to decide
                pass
    finally:
        run.process.close()
    return run.outcome
