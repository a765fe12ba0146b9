"""How good a trained policy is, as one number: what a sweep minimises."""

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
from experiments.comparison.evaluation import Choice, choices, grid_requests
from experiments.comparison.run_folder import RunFolder
from experiments.config import Config
from experiments.contexts import build_context, held_out_scorer
from rap_env.blocks import BlockMask
from rap_env.context.base import PruningContext
from rap_env.errors import RapError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.study import Study


class TrialPrunedError(RapError):
    """A sweep's trial is clearly worse than others were at the same step, so it stops."""


class ObjectiveScorer:
    """Judges choices by their loss on the text for choosing.

    That is the calibration text, or ``evaluate.selection`` if given, which no search has seen.

    Args:
        config: All settings.
        context: The model and its calibration text.

    Raises:
        CorpusError: The selection text is too short or overlaps with the calibration text.
        ModelNotAvailableError: There is a selection text, but the model is a score table.
    """

    def __init__(self, config: Config, context: PruningContext) -> None:
        self._on = judged_on(config)
        self._scorer = context.scorer
        if config.evaluate.selection is not None:
            self._scorer = held_out_scorer(config.evaluate.selection, "selection", context)

    def facts(self, found: Sequence[Choice]) -> dict[str, Any]:
        """The mean loss over the grid, nats per token, and what it was measured on.

        Raises:
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        dense_nll = self._scorer.dense_nll
        losses = [self._scorer.nll(BlockMask.of(*c.mask)) - dense_nll for c in found]
        return {"objective": sum(losses) / len(losses), "objective_on": self._on}


def judged_on(config: Config) -> dict[str, Any]:
    """The text and the grid that an objective is the loss on."""
    selection = config.evaluate.selection
    return {
        "text": asdict(selection) if selection is not None else "calibration",
        "requests": list(config.evaluate.requests),
        "budgets": list(config.evaluate.budgets),
    }


def objective(config: Config, folder: Path) -> float:
    """The objective of a finished training; measured again only if it was on another grid or text.

    Raises:
        RapError: As opening the context, the text or the policy does.
    """
    run, started = RunFolder(folder), time.monotonic()
    record = run.read() or {}
    if record.get("objective_on") != judged_on(config):
        context = build_context(config)
        requests = grid_requests(config.evaluate, context.memory)
        judge = ObjectiveScorer(config, context)
        record = judge.facts(choices(TrainedPolicy.load(folder, context), requests, context))
        run.finish(started, **record)
    return float(record["objective"])


log = logging.getLogger(__name__)

_RECENT_EPISODES = 50


class StudyCallback(Callback):
    """Makes ``n_trials`` the length of the study, so that the same command goes on with it.

    Args:
        marks: How often a training is compared with the others: a mark is the ``marks``-th part
            of its steps.
        pruner: The settings of an Optuna pruner, whose steps are these marks; None never prunes.
    """

    def __init__(self, marks: int, pruner: DictConfig | None) -> None:
        self.marks = marks
        self.pruner = pruner

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Leave to the sweeper what the study still lacks."""
        Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)  # for the study's file
        sweeper = config.hydra.sweeper
        if sweeper.n_jobs < 1:  # so joblib means every core
            with read_write(config):
                sweeper.n_jobs = os.cpu_count() or 1
        done, total = trials_done(sweeper), sweeper.n_trials
        if not done:
            return
        log.info("Study %s: %d of %d trials are done.", sweeper.study_name, done, total)
        with read_write(config):
            sweeper.n_trials = max(0, total - done)
            if sweeper.sampler.get("seed") is not None:  # else the first trials come again
                sweeper.sampler.seed += done


class RunningTrial:
    """One trial of a study, in the process that runs it.

    Args:
        study: The study, with the pruner that decides.
        storage: Where the study is kept.
        number: The trial's number in the study.
        marks: Into how many parts its training is divided; at the end of each it is compared.
    """

    def __init__(self, study: Study, storage: BaseStorage, number: int, marks: int) -> None:
        self.number = number
        self.marks = marks
        self._study = study
        self._storage = storage
        study_id = storage.get_study_id_from_name(study.study_name)
        self._id = storage.get_trial_id_from_study_id_trial_number(study_id, number)

    def report(self, mark: int, loss: float) -> None:
        """Tell the study how the training does at a mark."""
        self._storage.set_trial_intermediate_value(self._id, mark, loss)

    def should_stop(self) -> bool:
        """Whether the pruner gives it up after the last report."""
        return bool(self._study.pruner.prune(self._study, self._storage.get_trial(self._id)))


class Pruning:
    """A metric sink that ends a training which does badly beside others of its study.

    It reports the mean loss of the recent episodes' masks, nats per token, at each mark. It ends
    nothing before there is a checkpoint, since the policy is judged as it stands then.

    Args:
        trial: Where to report.
        total_timesteps: Length of the training.
        folder: The run's folder.
    """

    def __init__(self, trial: RunningTrial, total_timesteps: int, folder: Path) -> None:
        self._trial = trial
        self._total_timesteps = total_timesteps
        self._checkpoints = folder / "checkpoints"
        self._recent: deque[float] = deque(maxlen=_RECENT_EPISODES)
        self._mark = 0

    def __call__(self, metrics: dict[str, float], step: int) -> None:
        """Take the metrics of an episode or an update.

        Raises:
            TrialPrunedError: The trial is given up.
        """
        if "episode/loss" in metrics:
            self._recent.append(metrics["episode/loss"])
        mark = step * self._trial.marks // self._total_timesteps
        if not self._mark < mark < self._trial.marks or not self._recent:
            return
        if not any(self._checkpoints.glob("step_*")):
            return
        self._mark, loss = mark, sum(self._recent) / len(self._recent)
        self._trial.report(mark, loss)
        if self._trial.should_stop():
            raise TrialPrunedError(
                f"Trial {self._trial.number} of the study stops at step {step}: its recent loss "
                f"{loss:.3f} is worse than most others had there."
            )


def running_trial() -> RunningTrial | None:
    """The trial that this job is, or None outside a sweep that prunes."""
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
    """The newest running trial that has the hyperparameters which a job was given.

    The newest, since a trial whose job was killed stays in the study as running.

    Args:
        study: The study.
        overrides: The job's overrides, as the sweeper wrote them.
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
    """Trials of the study that came to an end, failed ones included; 0 if there is no study."""
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
