"""Sweeps: the objective, and trials of an Optuna study that resumes and prunes.

The sweeper (hydra-optuna-sweeper) asks the study for hyperparameters and reports the objective, but
does not tell a job which trial it runs. `StudyCallback` keeps the length of the sweep,
`running_trial` finds a job's trial by its hyperparameters, and `Pruning` reports to it.
"""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from hydra.utils import instantiate
from omegaconf import DictConfig, read_write

from agents.trained_policy import TrainedPolicy
from experiments.comparison.evaluation import grid_requests
from experiments.config import Config
from experiments.contexts import build_context, held_out_scorer, ladder_bytes
from experiments.study.run_folder import RunFolder
from rap_env.context.base import PruningContext
from rap_env.errors import RapError
from rap_env.plan import Plan

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study


class TrialPrunedError(RapError):
    """A trial is pruned because it is worse than other trials at the same step."""


class ObjectiveScorer:
    """Computes a sweep's objective: mean ΔNLL of the chosen masks on the selection text.

    The selection text is ``evaluate.selection``, or the calibration text where none is given.

    Raises:
        CorpusError: The selection text is too short or overlaps with the calibration text.
        ModelNotAvailableError: There is a selection text, but the model is a score table.
    """

    def __init__(self, config: Config, context: PruningContext) -> None:
        self._on = measured_on(config)
        self._scorer = context.scorer
        selection = config.evaluate.selection_text
        if selection is not None:
            self._scorer = held_out_scorer(selection, "selection", context)

    def facts(self, plans: Sequence[Plan]) -> dict[str, Any]:
        """Return the mean ΔNLL over the grid, nats per token, and what it was measured on."""
        dense_nll = self._scorer.dense_nll
        losses = [self._scorer.nll(plan) - dense_nll for plan in plans]
        return {"objective": sum(losses) / len(losses), "objective_on": self._on}


def measured_on(config: Config) -> dict[str, Any]:
    """Return the text and the grid that an objective is measured on."""
    selection = config.evaluate.selection_text
    pinned = {"pinned": list(config.evaluate.pinned)} if config.evaluate.pinned else {}
    return {
        "text": asdict(selection) if selection is not None else "calibration",
        "requests": list(config.evaluate.requests),
        "budgets": list(config.evaluate.budgets),
        **pinned,
    }


def objective(config: Config, folder: Path) -> float:
    """Return the objective of a finished training; measured again if grid or text differ."""
    run, started = RunFolder(folder), time.monotonic()
    record = run.read() or {}
    if record.get("objective_on") != measured_on(config):
        context = build_context(config)
        requests = grid_requests(config.evaluate, context.memory, ladder_bytes(config, context))
        scorer, policy = ObjectiveScorer(config, context), TrainedPolicy.load(folder, context)
        record = scorer.facts([policy.choose(request) for _, request in requests])
        run.finish(started, **record)
    return float(record["objective"])


log = logging.getLogger(__name__)

_RECENT_EPISODES = 50


class StudyCallback(Callback):
    """Interprets ``n_trials`` as the length of the study, so that the same command resumes it.

    Args:
        marks: Number of equal parts of a training, at the end of which trials are compared.
        pruner: Settings of an Optuna pruner, whose steps are these parts; None never prunes.
    """

    def __init__(self, marks: int, pruner: DictConfig | None) -> None:
        self.marks = marks
        self.pruner = pruner

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Reduce the sweeper's trials to those that the study still lacks."""
        Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)  # for the study's database
        sweeper = config.hydra.sweeper
        if sweeper.n_jobs < 1:  # joblib's notation for all cores
            with read_write(config):
                sweeper.n_jobs = os.cpu_count() or 1
        done, total = trials_done(sweeper), sweeper.n_trials
        if not done:
            return
        log.info("Study %s: %d of %d trials are finished.", sweeper.study_name, done, total)
        with read_write(config):
            sweeper.n_trials = max(0, total - done)
            if sweeper.sampler.get("seed") is not None:  # else the first trials would be repeated
                sweeper.sampler.seed += done


class RunningTrial:
    """The trial of a study that this process runs."""

    def __init__(self, study: Study, storage: BaseStorage, number: int, marks: int) -> None:
        self.number = number
        self.marks = marks
        self._study = study
        self._storage = storage
        study_id = storage.get_study_id_from_name(study.study_name)
        self._id = storage.get_trial_id_from_study_id_trial_number(study_id, number)

    def should_stop(self, mark: int, loss: float) -> bool:
        """Report the recent ΔNLL at a mark; return whether the study's pruner stops the trial."""
        self._storage.set_trial_intermediate_value(self._id, mark, loss)
        return bool(self._study.pruner.prune(self._study, self._storage.get_trial(self._id)))


class Pruning:
    """A metric sink that stops a training which is worse than others of its study.

    It reports the mean ΔNLL of the masks of recent episodes, nats per token, at each mark. It stops
    no training before its first checkpoint, because the objective is measured on a checkpoint.
    """

    def __init__(self, trial: RunningTrial, total_timesteps: int, folder: Path) -> None:
        self._trial = trial
        self._total_timesteps = total_timesteps
        self._checkpoints = folder / "checkpoints"
        self._recent: deque[float] = deque(maxlen=_RECENT_EPISODES)
        self._mark = 0

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of an episode or an update.

        Raises:
            TrialPrunedError: The trial is pruned.
        """
        if "episode/loss" in metrics:
            self._recent.append(metrics["episode/loss"])
        mark = step * self._trial.marks // self._total_timesteps
        if not self._mark < mark < self._trial.marks or not self._recent:
            return
        if not any(self._checkpoints.glob("step_*")):
            return
        self._mark, loss = mark, sum(self._recent) / len(self._recent)
        if self._trial.should_stop(mark, loss):
            raise TrialPrunedError(
                f"Trial {self._trial.number} of the study is pruned at step {step}: its recent "
                f"ΔNLL {loss:.3f} is worse than that of most trials at this step."
            )


def running_trial() -> RunningTrial | None:
    """Return the trial that this job runs; None outside a sweep with a pruner."""
    if not HydraConfig.initialized():
        return None
    hydra = HydraConfig.get()
    settings = hydra.callbacks.get("study")
    if hydra.mode != RunMode.MULTIRUN or settings is None or settings.pruner is None:
        return None
    import optuna

    storage = optuna.storages.get_storage(instantiate(hydra.sweeper.storage))
    study = optuna.load_study(
        study_name=hydra.sweeper.study_name, storage=storage, pruner=instantiate(settings.pruner)
    )
    number = trial_number(study, list(hydra.overrides.task))
    return None if number is None else RunningTrial(study, storage, number, settings.marks)


def trial_number(study: Study, overrides: list[str]) -> int | None:
    """Return the newest running trial with the hyperparameters of a job.

    It is the newest because a trial whose job was killed remains in the study as running.
    """
    import optuna

    given = set(overrides)
    for trial in reversed(study.get_trials(deepcopy=False)):
        if trial.state == optuna.trial.TrialState.RUNNING and given.issuperset(
            f"{name}={value}" for name, value in trial.params.items()
        ):
            return int(trial.number)
    return None


def trials_done(sweeper: DictConfig) -> int:
    """Return the number of finished trials, failed ones included; 0 without a study."""
    import optuna

    if sweeper.storage is None:
        return 0
    try:
        study = optuna.load_study(
            study_name=sweeper.study_name, storage=instantiate(sweeper.storage)
        )
    except KeyError:
        return 0
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))
