"""Open the Optuna study of a sweep, check that it belongs to the experiment, and export its trials as a frame."""

from __future__ import annotations

import hashlib
import warnings
from typing import Any

import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution
from optuna.trial import FrozenTrial

from mutransfer.errors import RequestError, StorageError
from mutransfer.schemas import TRIALS

from ._optuna_internals import storage_of, study_id
from .experiment import Experiment, values_of
from .pruners import Halving, judged_once
from .samplers import START, Auto, GaussianProcess, Independent, Quasirandom, Random, Sampler, inside, tpe
from .storage import Opened
from .workers import FINISHED, TrialQueue

__all__ = ["baseline", "open_queue", "pruner_for", "trials_frame"]

NAME = "mutransfer"
LAID_OUT = "trials at first"


def open_queue(experiment: Experiment, storage: Opened, name: str | None, owner: str) -> TrialQueue:
    """Open or create the study in ``storage``, and return the queue from which the worker ``owner`` takes its trials.

    Raises:
        StorageError: the storage cannot be read or holds the study of another experiment.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        study = optuna.create_study(
            storage=storage.backend,
            study_name=name or NAME,
            direction=experiment.direction,
            load_if_exists=True,
            pruner=pruner_for(experiment),
        )
        trials = study.get_trials(deepcopy=False)
    except RequestError:
        raise
    except (KeyError, ValueError) as error:
        raise StorageError(
            f"cannot read the study in {storage.where} ({error}): name another --storage or --out."
        ) from None
    _refuse_other_study(study, experiment, storage)
    laid_out = study.user_attrs.get(LAID_OUT)
    if laid_out is None:  # raising `trials` later adds points and leaves these unchanged
        study.set_user_attr(LAID_OUT, laid_out := experiment.trials)
    study.sampler = sampler = _sampler(experiment, len(trials), owner if storage.shared else "", laid_out)
    return TrialQueue(
        study, _distributions(experiment), experiment.trials, baseline(experiment), owner,
        waits=sampler.waits, hurry=storage.hurry,
    )  # fmt: skip


def _refuse_other_study(study: optuna.Study, experiment: Experiment, storage: Opened) -> None:
    """Raise a StorageError if the study belongs to another experiment: trials of that would count and could be the best."""
    if storage.own and len(names := optuna.get_all_study_names(storage_of(study))) > 1:
        storage_of(study).delete_study(study_id(study))
        raise StorageError(
            f"the run folder holds the study {min(set(names) - {study.study_name})!r}: leave out --study, or use another --out."
        )
    asked = experiment.question()
    known = study.user_attrs.get("experiment")
    if known is None:
        if trials := study.get_trials(deepcopy=False):
            searched = ", ".join(sorted({name for trial in trials for name in trial.params})) or "nothing"
            raise StorageError(
                f"the study {study.study_name!r} in {storage.where} was not made by mutransfer (its {len(trials)} trials search "
                f"{searched}): name another --study."
            )
        study.set_user_attr("experiment", asked)
        return
    known = {**Experiment().question(), **known}  # keys that earlier versions did not have
    if known != asked:
        key = next(key for key in asked if known.get(key) != asked[key])
        raise StorageError(
            f"the study {study.study_name!r} was made with {key} = {known.get(key)}, but this experiment has {asked[key]}: name "
            "another --study, or put it back."
        )


def _distributions(experiment: Experiment) -> dict[str, BaseDistribution]:
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
    """Return the recipe's values of the searched hyperparameters, for the first trial; None if any is outside its range."""
    chosen = _recipe_values(experiment)
    fits = all(inside(each, chosen[name]) for name, each in _distributions(experiment).items())
    return chosen if fits else None


def _recipe_values(experiment: Experiment) -> dict[str, Any]:
    values = values_of(experiment.recipe)
    return {name: values[name] for name in experiment.search}


def _sampler(experiment: Experiment, trials: int, worker: str, laid_out: int) -> Sampler:
    """Return the sampler, seeded by (seed, trials so far, worker).

    With the same seed, two workers that start together and see the same trials would draw the same start-up trials. ``worker``
    is empty if the storage is not shared.
    """
    digest = hashlib.sha256(f"{experiment.seed}/{trials}{worker}".encode()).digest()
    seed = int.from_bytes(digest[:4], "little")
    match experiment.sampler:
        case "auto":
            return Auto(seed)
        case "tpe":
            return tpe(seed)
        case "gp":
            return GaussianProcess(START, seed)
        case "qmc":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
                # With one seed, a resumed sequence continues where it ended, but two workers would draw the same points.
                return Quasirandom(scramble=True, seed=seed if worker else experiment.seed)
        case "independent":
            return Independent(_distributions(experiment), _recipe_values(experiment), laid_out)
        case _:
            return Random(seed=seed)


def pruner_for(experiment: Experiment) -> optuna.pruners.BasePruner:
    """Return the pruner that ``experiment`` names, judging at its rungs."""
    match experiment.pruner:
        case "half":
            return Halving(judged_once(experiment.rung_steps, experiment.steps), reduction=2)
        case "median":
            return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=0, interval_steps=1)
        case "halving" | "hyperband":
            return Halving(experiment.rung_steps, hyperband=experiment.pruner == "hyperband")
        case _:
            return optuna.pruners.NopPruner()


def trials_frame(trials: list[FrozenTrial]) -> pd.DataFrame:
    """Return all trials as a frame (`schemas.TRIALS` and one column per hyperparameter)."""
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
