"""Episodes of the task across models: ``python -m benchmarks.episodes``.

Each ends with a run of its model. Actions are random and valid; CPU seconds of `step` are counted.
"""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym

from benchmarks.measuring import Settings, target, write_record
from benchmarks.step import player
from experiments.study.console import run_with_settings
from rap_env.models.device import use_threads

TASK, LEAST_PER_S = "RAPLadder/Unseen-Train-v1", 600.0
"""The task, and how many of its episodes are to be made in a CPU second."""


@dataclass
class EpisodesSettings(Settings):
    """Settings of this benchmark."""

    num_envs: int = 1408
    """Sub-environments, which share the models."""
    turns: int = 12
    """Steps of each sub-environment in one measurement."""


def main(settings: EpisodesSettings) -> None:
    """Measure, and write the record."""
    if settings.threads is not None:
        use_threads(settings.threads)
    play = player(gym.make_vec(TASK, settings.num_envs, info="arrays"))
    play(2 * settings.turns)  # after this, episodes end at different times
    rates = [play(settings.turns).episodes for _ in range(settings.repeats)]
    what = f"episodes of `{TASK}` in a CPU second, {settings.num_envs} sub-environments"
    write_record("episodes", settings, [target(what, *rates, at_least=LEAST_PER_S)])


if __name__ == "__main__":
    run_with_settings(EpisodesSettings, main)
