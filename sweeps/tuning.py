"""Tuning: Optuna asks, an executor trains, Optuna is told; the run folder always holds all that is finished."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable

from optuna.trial import TrialState

from mutransfer.errors import RequestError
from mutransfer.io import naming_the_disk
from mutransfer.run_dir import RunFolder
from mutransfer.schemas import TRIALS

from .claims import Claims
from .executors import Planned, check_trainer, one_by_one
from .experiment import Experiment
from .findings import Tuned, best_so_far, summary, usable
from .jobs import Executor, flops_of, loaded, plan_of
from .leases import LEASE, Leases, worker_name
from .locks import only_one
from .repeating import LOOK_EVERY, Repeating
from .storages import naming_the_storage, opened, own_journal
from .study import baseline, distributions, open_study, trials_frame
from .telling import affordable, busy, told

__all__ = ["Tuned", "tune"]


def tune(
    experiment: Experiment,
    folder: RunFolder,
    *,
    storage: str | None = None,
    name: str | None = None,
    lease: float = LEASE,
    executor: Executor | None = None,
    device: str = "cpu",
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> Tuned:
    """Bring the study in ``folder`` to ``experiment.trials`` finished trials, and write what it found.

    The first trial is the experiment's own recipe, the one to beat. A trial that diverges is told as a finite penalty of
    twice its starting loss, so that the sampler learns to keep away. Running it again adds only the missing trials, and
    running it on several machines shares them.

    Args:
        experiment: what to tune.
        folder: run folder; made if it does not exist.
        storage: address of a storage (`storages.opened`), which other workers may share; by default a journal in the folder.
        name: study name.
        lease: seconds without a sign of life after which others take this worker for dead; the same for all of a study.
        executor: how trials are trained; one by one in this process by default.
        device: for the default executor.
        progress: called with (finished, total, what was found).

    Raises:
        RequestError: another experiment or another data hash is in the folder, the disk is full, every trial diverged,
            the budget reaches for none, or too many in a row failed.
    """
    begun = time.perf_counter()
    if experiment.folder is None:
        experiment = experiment.model_copy(update={"folder": os.getcwd()})
    executor = executor or one_by_one(experiment, folder.path, device)
    # A wrong model, corpus or size is said before anything is written.
    _, data = loaded(experiment)
    check_trainer(experiment)
    plan_of(experiment, experiment.proxy_scale, experiment.parametrization, experiment.recipe)
    flops = flops_of(experiment, experiment.proxy_scale)
    if flops is None and experiment.budget.flops is not None:
        raise RequestError("budget.flops cannot be counted without mutransfer's own data: use budget.seconds.")
    _refuse_other_experiment(experiment, folder)
    with contextlib.ExitStack() as held:
        store = held.enter_context(opened(storage)) if storage else None
        folder.make()
        held.enter_context(naming_the_disk(folder.path))
        if store is None or not store.shared:
            held.enter_context(only_one(folder))
        facts: dict[str, object] = {} if data is None else {"data_sha256": data.sha256, "data_facts": data.facts}
        name_of_data = experiment.data if data is None else data.name
        folder.note_environment(
            **facts, data=name_of_data, seed=experiment.seed, device=device, places=experiment.places(folder.path)
        )
        experiment.save(folder.experiment)
        folder.note_progress("tune", planned=experiment.trials, ended=False)
        store = store or own_journal(folder)
        held.enter_context(naming_the_storage(store))
        owner = worker_name()
        study = open_study(experiment, store, name, owner)
        claims = Claims(study, distributions(experiment), experiment.trials, baseline(experiment), owner)
        leases = held.enter_context(Leases(study, owner, lease)) if store.shared else None
        if leases is None:
            claims.give_back(trial for trial in claims.trials() if trial.state is TrialState.RUNNING)
        dead = list if leases is None else leases.lapsed
        if isinstance(executor, Planned):
            executor.expect(max(1, experiment.trials - claims.finished()))
        while (finished := claims.finished()) < experiment.trials and (
            affordable(experiment, claims, flops) or busy(claims)
        ):
            idle = True
            # The time left is told from when the first trial begins: before it, an executor may measure and compile for minutes.
            beginning = functools.partial(progress, finished, experiment.trials, best_so_far(study))
            for _ in told(experiment, claims, dead, executor, flops, beginning):
                idle = False
                TRIALS.write(trials_frame(claims.trials()), folder.trials)
                progress(min(claims.finished(), experiment.trials), experiment.trials, best_so_far(study))
            if idle:  # what is missing is being done by other workers
                beginning()
                time.sleep(LOOK_EVERY)
        claims.withdraw()
        frame = trials_frame(claims.trials())
        TRIALS.write(frame, folder.trials)
        again = None
        if experiment.repeats is not None:
            repeating = Repeating(experiment, study, usable(study), owner, leases)
            folder.note_progress("repeats", planned=len(repeating.wanted), ended=False)
            again = repeating.run(folder, executor, flops, progress)
            folder.note_progress("repeats", planned=len(repeating.wanted), ended=True)
        tuned = summary(experiment, study, frame, again, time.perf_counter() - begun)
        tuned.best.save(folder.best)
        folder.note_progress("tune", planned=experiment.trials, ended=True)
    return tuned


def _refuse_other_experiment(experiment: Experiment, folder: RunFolder) -> None:
    if not folder.experiment.exists():
        return
    before = Experiment.load(folder.experiment).question()
    now = experiment.question()
    for key in now:
        if before[key] != now[key]:
            raise RequestError(
                f"{folder.path} holds a study with {key} = {before[key]}, and this experiment has {now[key]}: use another "
                "--out, or put it back to go on with that study."
            )
