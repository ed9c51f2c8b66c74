"""The experiment file: the model, the proxy, the recipe and the search ranges of a sweep."""

from __future__ import annotations

import os
import shlex
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, model_validator

from mutransfer import run_dir
from mutransfer.config import Settings
from mutransfer.errors import FileError, SettingsError, nearest
from mutransfer.io import write_text
from mutransfer.methods import METHODS, ForwardGradient
from mutransfer.optimizers.rules import optimizer_rule
from mutransfer.parametrizations.tables import table
from mutransfer.proxies.load import DEFAULT_DATA
from mutransfer.recipe import Recipe, Scale
from mutransfer.run_dir import RunFolder
from mutransfer.tracing.roles import check_roles

from .pruners import geometric_rungs

__all__ = ["Budget", "Experiment", "NO_DATA", "PLACEHOLDERS", "Range", "Repeats", "Size", "Trainer"]

PLACEHOLDERS = ("recipe", "plan", "seed", "out", "slot")
AS_CALL = "write it as file.py:name or package.module:name"
AS_COMMAND = 'as in trainer: {command: "python train.py --plan {plan}"}'


class Trainer(Settings):
    """A user trainer, as given in an experiment; a plain string is a ``call``.

    Attributes:
        call: Python function as ``file.py:name`` or ``package.module:name`` (`user_trainers`).
        command: command line (`commands`).
        timeout: maximum seconds of each attempt of the command; None for no limit.
        retries: number of further attempts if the command fails.
        grace: seconds between asking the command to end and killing it.
    """

    call: str | None = None
    command: str | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    retries: Annotated[int, Field(ge=0, le=100)] = 0
    grace: Annotated[float, Field(ge=0, le=3600)] = 10.0

    @model_validator(mode="before")
    @classmethod
    def _bare(cls, given: Any) -> Any:
        return {"call": given} if isinstance(given, str) else given

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.call is None) == (self.command is None):
            raise ValueError(f"give either call, a Python function, or command, {AS_COMMAND}.")
        if self.call is not None:
            where, _, name = self.call.rpartition(":")
            if not where or not name.isidentifier():
                raise ValueError(
                    f"{self.call!r} does not name a function: {AS_CALL}; a command is written {AS_COMMAND}."
                )
            if self.timeout is not None or self.retries:
                raise ValueError(
                    "timeout and retries only apply to a command: a function in this process cannot be ended."
                )
        else:
            self._check_command()
        return self

    def _check_command(self) -> None:
        assert self.command is not None
        try:
            words = shlex.split(self.command)
            fields = [field for word in words for _, *field in string.Formatter().parse(word) if field[0] is not None]
        except ValueError as error:
            raise ValueError(
                f"the command cannot be read ({error}): quote it, and write a literal brace as {{{{ or }}}}."
            ) from None
        if not words:
            raise ValueError(f"the command is empty: write one, {AS_COMMAND}.")
        for name, *how in fields:
            if name not in PLACEHOLDERS or any(how):
                hint = nearest(str(name), PLACEHOLDERS)
                raise ValueError(
                    f"the command has the placeholder {{{name}}} (a literal brace is written {{{{ or }}}}): {hint}"
                )
        if not {"recipe", "plan"} & {name for name, *_ in fields}:
            raise ValueError(
                "the command has neither {recipe} nor {plan}, so every trial would train the same: add one."
            )

    def words(self, values: Mapping[str, str]) -> list[str]:
        """Return the command's words with `PLACEHOLDERS` replaced by ``values``; no shell interprets them."""
        assert self.command is not None
        return [word.format_map(values) for word in shlex.split(self.command)]

    def question(self) -> str:
        """Return the call or command, which determines the losses; timeout, retries and grace do not."""
        return self.call or str(self.command)

    def __str__(self) -> str:
        """Return the name used for the trainer in messages."""
        return self.call or "the trainer's command"


Count = Annotated[int, Field(ge=1)]
Cost = Annotated[float, Field(gt=0)]
NO_DATA = "none"
# Adam's betas are searched separately, since each one's distance from 1 is what matters.
BETAS = ("beta1", "beta2")
# Keys that limit the length of a sweep and may change when it is run again.
OPEN = ("trials", "budget", "repeats")


class Size(Settings):
    """Width and depth of a model."""

    width: Count
    depth: Count = 2


class Range(Settings):
    """Range of one hyperparameter: ``low`` to ``high`` (on a log scale if ``log``), or ``choices``."""

    low: float | None = None
    high: float | None = None
    log: bool = False
    choices: Annotated[tuple[float | int | str | bool, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = {name for name in ("low", "high", "choices") if getattr(self, name) is not None}
        if given not in ({"low", "high"}, {"choices"}):
            raise ValueError("give either low and high, or choices.")
        if self.low is not None and self.high is not None:
            if self.low >= self.high:
                raise ValueError(f"low {self.low:g} is not below high {self.high:g}: swap or widen them.")
            if self.log and self.low <= 0:
                raise ValueError(f"low {self.low:g} has no logarithm: make it positive or set log to false.")
        return self

    def ends(self) -> list[Any]:
        """Return the values to validate: the choices, or the ends of the range (between valid ends, every value is valid)."""
        return list(self.choices) if self.choices is not None else [self.low, self.high]


class Budget(Settings):
    """Cost limits of a sweep in addition to its number of trials; replicates do not count.

    A trial that would exceed a limit is not started. The limit on seconds does not apply to the first trials, whose duration is
    not yet known.

    Attributes:
        flops: floating point operations.
        seconds: seconds of the trials, added up over processes and machines.
    """

    flops: Cost | None = None
    seconds: Cost | None = None


class Repeats(Settings):
    """Replicates, to avoid choosing a trial that only had a lucky seed.

    The ``top`` trials are run again until each has ``seeds`` seeds, its first run included.
    """

    top: Count = 4
    seeds: Annotated[int, Field(ge=2)] = 3


class Experiment(Settings):
    """All settings of `mutransfer tune`, as read from YAML; docs/reference/experiment.md describes every key.

    ``proxy`` is the size that is trained. ``base`` (default: the proxy) is the size at which µP changes nothing and which the
    recipe refers to. ``roles`` (name pattern → role) override the inferred roles. ``trainer`` replaces the built-in training loop
    and may load its own data (``data: none``). With ``direction: maximize``, higher values reported by the trainer are better.
    ``search`` holds the ranges of the hyperparameters to search; ``recipe`` holds the values of the others, and of all of
    them in the first trial. Relative paths start from ``folder``, in which a trainer's command also runs: the folder of the
    file, or the current folder for an experiment without a file.
    """

    model: str = "transformer"
    options: dict[str, Any] = Field(default_factory=dict)
    roles: dict[str, str] = Field(default_factory=dict)
    trainer: Trainer | None = None
    direction: Literal["minimize", "maximize"] = "minimize"
    data: str = "bytes"
    sequence_length: Count = 64
    proxy: Size = Size(width=64)
    base: Size | None = None
    parametrization: str = "mup"
    optimizer: str = "adamw"
    steps: Count = 200
    batch_size: Count = 16
    recipe: Recipe = Recipe()
    search: dict[str, Range] = Field(default_factory=lambda: {"lr": Range(low=2**-12, high=2**-3, log=True)})
    sampler: Literal["auto", "gp", "tpe", "random", "qmc", "independent"] = "auto"
    pruner: Literal["half", "halving", "hyperband", "median", "none"] = "half"
    rungs: Annotated[int, Field(ge=1, le=32)] = 4
    trials: Count = 24
    budget: Budget = Budget()
    repeats: Repeats | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    folder: str | None = None

    shorthands: ClassVar[tuple[str, ...]] = ("method",)

    @model_validator(mode="before")
    @classmethod
    def _names_its_data(cls, given: Any) -> Any:
        """Fill in the default data of a built-in model; a user's model must name its data."""
        if not isinstance(given, dict) or given.get("data") is not None:
            return given
        model = given.get("model", cls.model_fields["model"].default)
        if not isinstance(model, str) or model in DEFAULT_DATA:
            return {**given, "data": DEFAULT_DATA.get(str(model), "bytes")}
        if given.get("trainer") is not None:
            return {**given, "data": NO_DATA}
        raise ValueError(
            f"{model} is a model of your own, and the experiment does not say what it trains on: name data (digits, bytes, "
            "markov, text:PATH or bin:PATH), or a trainer, a function that makes its batches (docs/how-to/user-trainer.md)."
        )

    @model_validator(mode="before")
    @classmethod
    def _takes_method(cls, given: Any) -> Any:
        """Accept ``method`` as a key of its own; it is part of the recipe."""
        return _with_method_in_recipe(given)

    @model_validator(mode="before")
    @classmethod
    def _searches_known(cls, data: Any) -> Any:
        """Check the names of searched hyperparameters before their ranges."""
        known = {*Recipe.model_fields, *BETAS} - {"betas", "decay", "decay_policy", "method"}
        known |= {name for method in METHODS.values() for name in method.searchable}
        search = data.get("search") if isinstance(data, dict) else None
        for name, range_ in search.items() if isinstance(search, dict) else ():
            if name not in known:
                raise ValueError(f"search.{name} is not a hyperparameter of a recipe: {nearest(str(name), known)}")
            if not isinstance(range_, dict | Range):
                raise ValueError(
                    f"search.{name} is {range_!r}, but a range has low and high (log: true for a log scale), or choices: give "
                    f"these, or fix the value as recipe.{name}."
                )
        return data

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        table(self.parametrization)
        check_roles(self.roles, "roles")
        optimizer_rule(self.optimizer, self.recipe)
        if self.data == NO_DATA and self.trainer is None:
            raise ValueError("data none is for a trainer that loads its own: name its trainer, or other data.")
        if self.trainer is not None and (method := self.recipe.method.name) != "backprop":
            raise ValueError(
                f"method {method} is for the built-in loop, which {self.trainer} replaces: take one of them out."
            )
        if self.maximize and self.trainer is None:
            raise ValueError(
                "direction maximize is for a trainer that reports a metric, but the built-in loop's loss is minimized: name "
                "a trainer, or leave direction out."
            )
        for name, range_ in self.search.items():
            if name in (idle := self._idle()):
                raise ValueError(f"search.{name} has no effect here ({idle[name]}): take it out.")
            if name == "tangents" and range_.choices is None:
                raise ValueError("search.tangents is a whole number: give choices, such as {choices: [2, 4, 8, 16]}.")
            for value in range_.ends():
                optimizer_rule(self.optimizer, with_values(self.recipe, {name: value}))
        if self.sampler == "independent" and self.trials < (least := 2 + 2 * len(self.search)):
            raise ValueError(
                f"sampler independent needs at least {least} trials for {len(self.search)} lines: raise trials."
            )
        if self.pruner in ("halving", "hyperband") and not self.rung_steps:
            raise ValueError(f"pruner {self.pruner} needs a rung before the end of {self.steps} steps: raise steps.")
        return self

    def _idle(self) -> dict[str, str]:
        """Return the hyperparameters that have no effect, with the reason: a search over them would report noise as a result."""
        rule, others = (
            optimizer_rule(self.optimizer, self.recipe),
            ("momentum", *BETAS, "eps", "eps2", "adamw_lr_ratio"),
        )
        read = {name: rule.reads(with_values(self.recipe, {name: 0.123})) for name in others}
        idle = {name: f"{self.optimizer} has none" for name in others if read[name] == rule.reads(self.recipe)}
        method = self.recipe.method
        others_settings = {name for each in METHODS.values() for name in each.searchable} - {*method.searchable}
        idle |= dict.fromkeys(others_settings, f"the method {method.name} has none")
        if isinstance(method, ForwardGradient):
            idle["clip"] = "the norm of a forward gradient grows with the number of parameters, so it is not clipped"
        idle["law"] = "it acts between the proxy's batch and duration and the target's"
        schedules = self.search["schedule"].ends() if "schedule" in self.search else [self.recipe.schedule]
        if "wsd" not in schedules:
            idle["cooldown"] = "only the schedule wsd has one"
        return idle

    @property
    def maximize(self) -> bool:
        """Whether higher reported values are better."""
        return self.direction == "maximize"

    @property
    def rung_steps(self) -> tuple[int, ...]:
        """The steps at which a trial reports: evenly spaced, or a geometric sequence for halving and hyperband."""
        if self.pruner in ("halving", "hyperband"):
            return geometric_rungs(self.steps, self.rungs)
        return tuple(round(self.steps * k / (self.rungs + 1)) for k in range(1, self.rungs + 1))

    @property
    def proxy_scale(self) -> Scale:
        """The scale at which trials are trained."""
        return Scale(self.proxy.width, self.proxy.depth)

    @property
    def base_scale(self) -> Scale:
        """The scale that the recipe refers to."""
        base = self.base or self.proxy
        return Scale(base.width, base.depth)

    def extremes(self) -> list[Recipe]:
        """Return the recipes at the ends of the searched settings of the method, one setting at a time."""
        searched = [(name, self.search[name].ends()) for name in self.recipe.method.searchable if name in self.search]
        return [with_values(self.recipe, {name: value}) for name, ends in searched for value in ends]

    def question(self) -> dict[str, Any]:
        """Return the settings that must match for trials to be comparable: all but trials, budget, repeats and folder."""
        asked = self.model_dump(mode="json", exclude={*OPEN, "folder"})
        return asked | {"trainer": None if self.trainer is None else self.trainer.question()}

    def subject(self) -> dict[str, Any]:
        """Return the settings, without the recipe, that identify what a verdict is about; the model's path is absolute."""
        asked = self.model_dump(mode="json", include={"parametrization", "optimizer", "model", "options"})
        path = run_dir.path_of("model", self.model)
        if path is not None and self.folder is not None:
            asked["model"] = run_dir.with_path("model", self.model, os.path.normpath(os.path.join(self.folder, path)))
        return asked | {"method": str(self.recipe.method)}

    def references(self) -> dict[str, str]:
        """Return the settings that may contain a path, with the keys that `run_dir.path_of` accepts: model, data and call."""
        call = None if self.trainer is None else self.trainer.call
        return {"model": self.model, "data": self.data, **({} if call is None else {"call": call})}

    def referring(self, references: dict[str, str]) -> Experiment:
        """Return this experiment with other references; see `references`."""
        changes: dict[str, Any] = {key: references[key] for key in ("model", "data")}
        if self.trainer is not None and self.trainer.call is not None:
            changes["trainer"] = self.trainer.model_copy(update={"call": references["call"]})
        return self.model_copy(update=changes)

    def here(self) -> Experiment:
        """Return this experiment with paths relative to the current folder."""
        return self.referring(
            {key: run_dir.from_here(key, each, self.folder) for key, each in self.references().items()}
        )

    def places(self, record_dir: Path) -> dict[str, str]:
        """Return where the experiment's folder and its files are, to be recorded in ``record_dir`` (`run_dir.recorded`)."""
        return {} if self.folder is None else run_dir.recorded(self.references(), self.folder, record_dir)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the experiment to ``path`` as YAML, including all defaults."""
        return write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))

    @classmethod
    def load(cls, path: str | os.PathLike[str], changes: list[str] | None = None) -> Experiment:
        """Read an experiment file, with ``changes`` like ``recipe.lr=0.01`` applied before it is validated.

        Raises:
            FileError: the file does not exist or is not valid YAML.
            SettingsError: it has an unknown key or a value out of range.
        """
        try:
            data = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            raise FileError(f"there is no {path}: write one with `mutransfer init`.") from None
        except IsADirectoryError:
            raise FileError(f"{path} is a folder: name the experiment file in it.") from None
        except OSError as error:
            raise FileError(f"cannot read {path} ({os.strerror(error.errno or 0)}): name an experiment file.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise FileError(f"{path} is not valid YAML: {' '.join(str(error).split())}.") from None
        home = RunFolder(Path(os.path.abspath(path)).parent)
        if isinstance(data, dict):
            # In run folders of earlier versions, paths were relative to the current folder.
            if "folder" not in data and not (home.trials.exists() or home.journal.exists()):
                data["folder"] = "."
            try:
                data = _with_method_in_recipe(data)
            except ValueError as error:
                raise SettingsError(f"{path}: {error}") from None
            for change in changes or []:
                _apply(data, change)
        experiment = cls.read(data, str(path))
        if experiment.folder is None:
            return experiment
        experiment = experiment.model_copy(update={"folder": os.path.normpath(home.path / experiment.folder)})
        return experiment._with_typed(changes or [])._moved(home, None)

    @classmethod
    def of_run(cls, run: RunFolder) -> Experiment:
        """Read the experiment of a run folder.

        The folder may have been moved, alone or together with the files that the experiment names.

        Raises:
            FileError: the experiment cannot be read, or a file that it names no longer exists.
            SettingsError: it has an unknown key or a value out of range.
        """
        return cls.load(run.experiment)._moved(run, f"the run {run.path}")

    def _moved(self, run: RunFolder, what: str | None) -> Experiment:
        """Return the experiment with its paths updated from the record in ``run``; ``what`` names it in messages."""
        known = run.read_environment().get("places", {})
        if self.folder is None or not known:
            return self
        references, folder = run_dir.found(self.references(), self.folder, known, run.path, what)
        return self.referring(references).model_copy(update={"folder": folder})

    def _with_typed(self, changes: list[str]) -> Experiment:
        """Return the experiment with paths given on the command line taken as relative to the current folder."""
        assert self.folder is not None
        typed = {change.partition("=")[0] for change in changes}
        keys = {"model": {"model"}, "data": {"data"}, "call": {"trainer", "trainer.call"}}
        references = {
            key: run_dir.anchored(key, each, self.folder) if typed & keys[key] else each
            for key, each in self.references().items()
        }
        here = self.referring(references)
        if here.trainer is None or here.trainer.command is None or not typed & {"trainer", "trainer.command"}:
            return here
        words = shlex.split(here.trainer.command)
        if os.path.samefile(self.folder, os.getcwd()) or not any(map(os.path.isfile, words)):
            return here
        command = shlex.join(os.path.abspath(word) if os.path.isfile(word) else word for word in words)
        return here.model_copy(update={"trainer": here.trainer.model_copy(update={"command": command})})


def _with_method_in_recipe(given: Any) -> Any:
    """Return the data of an experiment with the key ``method`` moved into its recipe."""
    if not isinstance(given, dict) or "method" not in given:
        return given
    recipe = given.get("recipe") or {}
    recipe = recipe.model_dump() if isinstance(recipe, Recipe) else recipe
    if not isinstance(recipe, dict):
        return given
    if "method" in recipe:
        raise ValueError("the method is given twice, as method and as recipe.method: take one of them out.")
    rest = {key: value for key, value in given.items() if key != "method"}
    return {**rest, "recipe": {**recipe, "method": given["method"]}}


def with_values(recipe: Recipe, values: dict[str, Any]) -> Recipe:
    """Return ``recipe`` with searched values filled in: beta1 and beta2 in ``betas``, and the method's in ``method``."""
    values = dict(values)
    beta1, beta2 = recipe.betas
    betas = (values.pop("beta1", beta1), values.pop("beta2", beta2))
    settings = {name: values.pop(name) for name in recipe.method.searchable if name in values}
    return recipe.with_(**values, betas=betas, method={**recipe.method.model_dump(), **settings})


def values_of(recipe: Recipe) -> dict[str, Any]:
    """Return the values of a recipe under the names by which they are searched; the inverse of `with_values`."""
    settings = {name: getattr(recipe.method, name) for name in recipe.method.searchable}
    return {**recipe.model_dump(), **dict(zip(BETAS, recipe.betas, strict=True)), **settings}


def _apply(data: dict[str, Any], change: str) -> None:
    key, equals, text = change.partition("=")
    if not equals or not key:
        raise SettingsError(f"--set {change!r} is not of the form key=value, as in recipe.lr=0.01.")
    if key == "method" or key.startswith("method."):
        key = f"recipe.{key}"
    *path, last = key.split(".")
    for part in path:
        if part == "method" and isinstance(data.get(part), str):
            data[part] = {"name": data[part]}
        if data.get(part) is None:
            data[part] = {}  # also replaces an empty section
        data = data[part]
        if not isinstance(data, dict):
            raise SettingsError(f"--set {change!r}: {part} holds a value and no further keys.")
    try:
        # YAML 1.1 reads 1e-3 as a string, which is never intended here.
        data[last] = float(text) if _is_number(text) and not text.lstrip("+-").isdigit() else yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"--set {change!r} is not valid YAML: {' '.join(str(error).split())}.") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
