"""Training: vector environment, metrics, checkpoints and resuming."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import KVWriter, Logger
from stable_baselines3.common.vec_env import VecEnv, VecMonitor, VecNormalize
from tqdm import tqdm

from agents.algorithms import AgentConfig, make_model
from agents.checkpoint import check_same_run, latest_checkpoint, save_checkpoint
from agents.vector_env import GymVecEnv
from rap_env.errors import RapError
from rap_env.models.progress import progress_bar

log = logging.getLogger(__name__)

MetricSink = Callable[[dict[str, float], int], None]
"""Takes metrics by name and the number of environment steps done."""

MakeEnvs = Callable[[int], VectorEnv[Any, Any, Any]]
"""Makes a vector environment with the given number of sub-environments."""

WarmStart = Callable[[BaseAlgorithm], object]
"""Prepares a new model before reinforcement learning (`agents.imitation`)."""

_RECENT_EPISODES = 50


class TrainingDivergedError(RapError, ArithmeticError):
    """The networks' parameters are no longer finite."""


@dataclass(frozen=True)
class TrainResult:
    """Result of a training. Counts and times include those before a resume.

    Attributes:
        episodes: Finished episodes.
        evaluations: Plans whose score was needed, stored scores included.
        seconds: Wall time.
        recent_delta_nll: Mean rise in NLL of the plans of the last episodes that fit their
            budget, nats per token; NaN if there are none.
    """

    timesteps: int
    episodes: int
    evaluations: int
    seconds: float
    recent_delta_nll: float


def train(
    config: AgentConfig,
    make_envs: MakeEnvs,
    run_dir: str | Path,
    *,
    log_fns: Sequence[MetricSink] = (),
    progress: bool = True,
    warm_start: WarmStart | None = None,
) -> TrainResult:
    """Train an agent, or resume the training in `run_dir`.

    A checkpoint is written after every rollout (PPO) or every thousand steps (DQN). A killed
    training resumes from its last checkpoint, with new episodes. A finished training is not
    repeated.

    Args:
        config: Agent, length and hyperparameters.
        make_envs: Makes a gymnasium vector environment with the given number of
            sub-environments and the autoreset mode ``SAME_STEP``.
        run_dir: Folder of this run; checkpoints are written to its ``checkpoints``.
        log_fns: Called after each episode and each update with metrics by name:
            ``episode/*``, ``train/*``, ``time/*``. A resumed training repeats the steps since
            its checkpoint.
        progress: Show a progress bar on a terminal.
        warm_start: Called once with the new model before training; not after a resume. Its
            seconds and evaluations count as those of the training.

    Raises:
        ArtifactError: The run was started with other settings, or all its checkpoints are
            damaged.
        StorageFullError: There is no space for a checkpoint.
        TrainingDivergedError: The parameters became NaN or infinite.
    """
    run_dir = Path(run_dir)
    venv = make_vector_env(config, make_envs)
    contexts = set(venv.get_attr("context")) if venv.has_attr("context") else set()
    scored_before = _evaluations(contexts)
    try:
        checkpoint = latest_checkpoint(run_dir / "checkpoints")
        if checkpoint is None:
            model, done = _new_model(config, venv, warm_start)
        else:
            check_same_run(checkpoint, config, venv)
            model, done = checkpoint.load_model(venv), checkpoint.body["progress"]
            log.info("Training resumes from step %d of %s.", checkpoint.step, run_dir)
        model.set_logger(Logger(folder=None, output_formats=[_SinkWriter(log_fns)]))
        recorder = Recorder(config, run_dir, log_fns, done, progress, contexts, scored_before)
        remaining = config.total_timesteps - model.num_timesteps
        if remaining > 0:
            _learn(model, remaining, recorder, fresh=checkpoint is None)
    finally:
        venv.close()
    return TrainResult(
        timesteps=model.num_timesteps,
        recent_delta_nll=recorder.recent_delta_nll,
        episodes=int(recorder.totals["episodes"]),
        evaluations=int(recorder.totals["evaluations"]),
        seconds=recorder.totals["seconds"],
    )


def _new_model(
    config: AgentConfig, venv: VecEnv, warm_start: WarmStart | None
) -> tuple[BaseAlgorithm, dict[str, float]]:
    """Make a model, warm-start it if asked, and return it with the progress so far."""
    start = time.perf_counter()
    model = make_model(config, venv)
    if warm_start is not None:
        warm_start(model)
    return model, {"seconds": time.perf_counter() - start}


def make_vector_env(config: AgentConfig, make_envs: MakeEnvs) -> VecEnv:
    """Make `config.n_envs` sub-environments with a monitor and normalised rewards.

    Rewards are divided by the running deviation of returns; observations are in [0, 1] already.
    """
    venv = VecMonitor(GymVecEnv(make_envs(config.n_envs)))
    return VecNormalize(venv, norm_obs=False, gamma=config.hyperparameters["gamma"])


def _learn(model: BaseAlgorithm, steps: int, recorder: Recorder, fresh: bool) -> None:
    try:
        model.learn(steps, callback=recorder, reset_num_timesteps=fresh, log_interval=1)
    except ValueError as error:  # torch raises it when it samples from NaN logits
        _check_finite(model, error)
        raise
    finally:
        recorder.close()
    _check_finite(model)
    recorder.save()
    model.logger.dump(model.num_timesteps)  # losses of the last update


def _check_finite(model: BaseAlgorithm, cause: Exception | None = None) -> None:
    parameters = torch.nn.utils.parameters_to_vector(model.policy.parameters())
    if not bool(torch.isfinite(parameters).all()):
        raise TrainingDivergedError(
            f"Training diverged: parameters are NaN or infinite after {model.num_timesteps} steps. "
            "The last checkpoint is older; lower learning_rate and start a new run, or check the "
            "rewards."
        ) from cause


class Recorder(BaseCallback):
    """Callback that logs metrics, updates the progress bar and saves checkpoints."""

    def __init__(
        self,
        config: AgentConfig,
        run_dir: Path,
        sinks: Sequence[MetricSink],
        done: dict[str, float],
        show_bar: bool,
        contexts: Collection[Any],
        scored_before: int,
    ) -> None:
        super().__init__()
        self._config = config
        self._folder = run_dir / "checkpoints"
        self._sinks = sinks
        self._show_bar = show_bar
        self._contexts, self._scored_before = contexts, scored_before
        self._recent: deque[float] = deque(maxlen=_RECENT_EPISODES)
        self._bar: tqdm[Any] | None = None
        self._saved_at = -1
        self.totals = {"episodes": 0.0, "evaluations": 0.0, "seconds": 0.0, **done}

    @property
    def recent_delta_nll(self) -> float:
        """As in `TrainResult`."""
        return float(np.mean(self._recent)) if self._recent else math.nan

    def save(self) -> None:
        """Write a checkpoint now."""
        if self._saved_at != self.num_timesteps:
            # A resumed training has no losses of this update.
            self.logger.dump(self.num_timesteps)
            self._count()
            save_checkpoint(self._folder, self.model, self._config, dict(self.totals))
            self._saved_at = self.num_timesteps

    def close(self) -> None:
        """Close the progress bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _on_training_start(self) -> None:
        self._before = dict(self.totals)
        self._start = time.perf_counter()
        self._start_step = self._saved_at = self.num_timesteps
        self._invalid = np.zeros(self.training_env.num_envs, dtype=np.int64)
        self._delta_key: str = self.training_env.get_attr("delta_key")[0]
        self._bar = progress_bar(
            self._show_bar,
            total=max(self._config.total_timesteps, self.num_timesteps),
            initial=self.num_timesteps,
            desc=f"train {self._config.name}",
            unit="step",
        )

    def _on_rollout_start(self) -> None:
        _check_finite(self.model)
        if self.num_timesteps - self._saved_at >= self._config.algorithm.checkpoint_steps:
            self.save()

    def _on_step(self) -> bool:
        assert self._bar is not None
        seen, actions = cast(Any, self.model)._last_obs, self.locals["actions"]
        self._invalid += seen["action_mask"][np.arange(len(actions)), actions] == 0
        for index, info in enumerate(self.locals["infos"]):
            if "episode" in info:
                self._episode_ended(info, int(self._invalid[index]))
                self._invalid[index] = 0
        self._bar.update(self.training_env.num_envs)
        return True

    def _episode_ended(self, info: dict[str, Any], invalid: int) -> None:
        assert self._bar is not None
        self.totals["episodes"] += 1
        self._count()
        fits = not info["TimeLimit.truncated"]
        metrics = {
            "episode/number": self.totals["episodes"],
            "episode/return": float(info["episode"]["r"]),
            "episode/length": float(info["episode"]["l"]),
            "episode/invalid_actions": float(invalid),
            "episode/fits": float(fits),
            "time/evaluations": self.totals["evaluations"],
            "time/seconds": self.totals["seconds"],
            "time/steps_per_s": self._steps_per_s(),
        }
        if fits:  # the NLL of a plan that does not fit means nothing
            delta_nll = float(info[self._delta_key])
            metrics["episode/delta_nll"] = delta_nll
            self._recent.append(delta_nll)
        for sink in self._sinks:
            sink(metrics, self.num_timesteps)
        self._bar.set_postfix_str(
            f"{self.totals['episodes']:.0f} episodes, ΔNLL {self.recent_delta_nll:.3f}",
            refresh=False,
        )

    def _count(self) -> None:
        spent = time.perf_counter() - self._start
        self.totals["seconds"] = self._before["seconds"] + spent
        run = _evaluations(self._contexts) - self._scored_before
        self.totals["evaluations"] = self._before["evaluations"] + run

    def _steps_per_s(self) -> float:
        spent = time.perf_counter() - self._start
        return (self.num_timesteps - self._start_step) / max(spent, 1e-9)


class _SinkWriter(KVWriter):
    """Forwards the metrics that stable-baselines3 logs about updates to the sinks."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = sinks

    def write(
        self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0
    ) -> None:
        """Forward metrics of the update; `Recorder` logs episodes and time itself."""
        metrics = {
            key: float(value)
            for key, value in key_values.items()
            if key.startswith(("train/", "rollout/exploration"))
        }
        if metrics:
            for sink in self._sinks:
                sink(metrics, step)

    def close(self) -> None:
        """Do nothing; there is nothing to close."""


def _evaluations(contexts: Collection[Any]) -> int:
    """Return how many scores contexts were asked for."""
    return sum(int(context.scorer.known) for context in contexts)
