"""The Optuna study of a run folder: opened, healed, compared with what is asked, and read out as a frame."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.trial import FrozenTrial, TrialState

from mutransfer.errors import RequestError
from mutransfer.frames import TRIALS
from mutransfer.runs import RunFolder

from .experiment import BETAS, Experiment

__all__ = ["FINISHED", "distributions", "open_study", "only_one", "reach", "trials_frame"]

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
NAME = "mutransfer"


@contextlib.contextmanager
def only_one(folder: RunFolder) -> Iterator[None]:
    """Hold the run folder for this process: a second sweep in it would take the first one's trials for dead.

    Raises:
        RequestError: another process holds it.
    """
    with open(folder.path / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(
                f"another process is at work in {folder.path}: wait for it or use another --out."
            ) from None
        yield


def reach(storage: str) -> BaseStorage:
    """Open an Optuna storage by its URL.

    Raises:
        RequestError: it cannot be reached.
    """
    try:
        return optuna.storages.get_storage(storage)
    except Exception as error:  # whatever its driver raises
        reason = " ".join(f"{type(error).__name__}: {error}".splitlines()[:1])
        raise RequestError(
            f"cannot open the storage {storage} ({reason}): check that it runs and its address."
        ) from None


def open_study(
    experiment: Experiment, folder: RunFolder, storage: BaseStorage | None, name: str | None
) -> optuna.Study:
    """Open or create the study, heal a torn journal, and return what a killed process had begun to the queue.

    Raises:
        RequestError: the journal is not one, or the storage holds something else.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(
            storage=storage or JournalStorage(_journal(folder.journal)),
            study_name=name or NAME,
            direction="minimize",
            load_if_exists=True,
            pruner=_pruner(experiment),
        )
        trials = study.get_trials(deepcopy=False)
    except (KeyError, ValueError) as error:
        where = "that storage" if storage else folder.journal
        raise RequestError(f"cannot read the study in {where} ({error}): name another --storage or --out.") from None
    _refuse_other_study(study, experiment, storage is None)
    study.sampler = _sampler(experiment, len(trials))
    if storage is None:
        for trial in trials:
            if trial.state is TrialState.RUNNING:
                study.enqueue_trial(trial.params or trial.system_attrs.get("fixed_params", {}))
                study.tell(trial.number, state=TrialState.FAIL)
    return study


def _refuse_other_study(study: optuna.Study, experiment: Experiment, own_journal: bool) -> None:
    """One study is one question: trials of another experiment in it would count, and one could be called the best."""
    if own_journal and len(names := optuna.get_all_study_names(study._storage)) > 1:
        study._storage.delete_study(study._study_id)
        raise RequestError(
            f"the run folder holds the study {min(set(names) - {study.study_name})!r}: leave out --study, or use another --out."
        )
    asked = experiment.model_dump(mode="json", exclude={"trials"})
    known = study.user_attrs.get("experiment")
    if known is None:
        study.set_user_attr("experiment", asked)
        return
    known = {"roles": {}, **known}  # a key that earlier versions did not have
    if known != asked:
        key = next(key for key in asked if known.get(key) != asked[key])
        raise RequestError(
            f"the study {study.study_name!r} was made with {key} = {known.get(key)}, and this experiment has {asked[key]}: name "
            "another --study, or put it back."
        )


def _journal(path: Path) -> JournalFileBackend:
    """The journal, cut back to its last whole line: a process killed in a write leaves half a line, fatal to the next."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)
    return JournalFileBackend(str(path), _Held(str(path)))


class _Held(JournalFileSymlinkLock):
    """No lock: the folder is held already (`only_one`).

    Optuna's own outlives a killed process, is then waited for (without end where the path is relative, as its link
    dangles), and turns a Ctrl-C during its release into a FileNotFoundError.
    """

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        pass


def distributions(experiment: Experiment) -> dict[str, BaseDistribution]:
    """Return the search space as Optuna's distributions."""
    space: dict[str, BaseDistribution] = {}
    for name, range_ in experiment.search.items():
        if range_.choices is not None:
            space[name] = CategoricalDistribution(range_.choices)
        else:
            assert range_.low is not None
            assert range_.high is not None
            space[name] = FloatDistribution(range_.low, range_.high, log=range_.log)
    return space


def baseline(experiment: Experiment) -> dict[str, Any] | None:
    """Return the recipe's own values of what is searched, the first trial; None if they lie outside the ranges."""
    values = {**experiment.recipe.model_dump(), **dict(zip(BETAS, experiment.recipe.betas, strict=True))}
    chosen = {name: values[name] for name in experiment.search}
    for name, distribution in distributions(experiment).items():
        if isinstance(distribution, CategoricalDistribution):
            inside = chosen[name] in distribution.choices
        else:
            inside = chosen[name] is not None and distribution._contains(chosen[name])
        if not inside:
            return None
    return chosen


def _sampler(experiment: Experiment, trials: int) -> optuna.samplers.BaseSampler:
    """The sampler, seeded by (seed, trials so far): the same seed on resuming would draw the same start-up trials again."""
    digest = hashlib.sha256(f"{experiment.seed}/{trials}".encode()).digest()
    seed = int.from_bytes(digest[:4], "little")
    match experiment.sampler:
        case "tpe":
            return optuna.samplers.TPESampler(n_startup_trials=8, multivariate=True, constant_liar=True, seed=seed)
        case "gp":
            return optuna.samplers.GPSampler(n_startup_trials=8, seed=seed)
        case "qmc":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                return optuna.samplers.QMCSampler(scramble=True, seed=experiment.seed)
        case _:
            return optuna.samplers.RandomSampler(seed=seed)


def _pruner(experiment: Experiment) -> optuna.pruners.BasePruner:
    match experiment.pruner:
        case "median":
            return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=0, interval_steps=1)
        case "halving":
            return optuna.pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=3)
        case _:
            return optuna.pruners.NopPruner()


def trials_frame(trials: list[FrozenTrial]) -> pd.DataFrame:
    """Return all trials as a frame (`frames.TRIALS` and one column per hyperparameter)."""
    names = sorted({name for trial in trials for name in trial.params})
    rows = []
    for trial in trials:
        outcome = trial.user_attrs.get("outcome", {})
        row: dict[str, Any] = {
            "number": trial.number,
            "state": trial.state.name,
            "value": outcome.get("loss", trial.value if trial.state in FINISHED else None),
            "diverged": bool(outcome.get("diverged", False)),
            "steps": outcome.get("steps"),
            "flops": outcome.get("flops"),
            "seconds": outcome.get("seconds"),
        }
        rows.append(row | {name: trial.params.get(name) for name in names})
    return TRIALS.frame(rows)
