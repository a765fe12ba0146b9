"""``python -m experiments.demo``: ladder, profile, train, evaluate and report in one process.

Finished work is not repeated, so the same command resumes after a kill.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra import compose
from omegaconf import OmegaConf

from experiments.config import Config
from experiments.config.training import AgentConfig
from experiments.console import say
from experiments.evaluate import evaluate
from experiments.ladder.study import STUDY as LADDER
from experiments.launch import launch
from experiments.profile import profile
from experiments.report import report
from experiments.study.run_names import run_label
from experiments.train import train

log = logging.getLogger(__name__)

_FEW_TOKENS = 32


def demo(config: Config, folder: Path) -> Path:
    """Run the five stages and print the comparison.

    Returns:
        The report's path. This program writes only its log to `folder`.
    """
    started = time.monotonic()
    say("[1/5] precision before removal: loss against bytes")
    LADDER.run(ladder_settings(config), config.stage_dir("ladder"))
    say("[2/5] importance of each block, and a search of good plans, on calibration text")
    profile(replace(config, stage="profile"), config.stage_dir("profile"))
    say(f"[3/5] training on {config.env.id}")
    for agent in demo_agents(config):
        for seed in config.demo["seeds"]:
            settings = replace(config, stage="train", agent=agent, seed=seed)
            label = run_label("train", agent.label or agent.name, seed)
            train(settings, config.stage_dir("train") / label)
    say("[4/5] evaluation against the baselines on held-out text")
    evaluate(replace(config, stage="evaluate"), config.stage_dir("evaluate"))
    say("[5/5] report")
    page = report(replace(config, stage="report"), config.stage_dir("report"))
    say(f"Done in {(time.monotonic() - started) / 60:.1f} minutes.")
    return page


def ladder_settings(config: Config) -> Config:
    """Return the settings of the ladder: of the unquantised model, and without calibration.

    The ladder's policies come with the package. Calibration text is as short as possible, since the
    unquantised model would write its own.
    """
    return replace(
        config,
        stage="ladder",
        model=replace(config.model, weights="bf16"),
        calibration=replace(config.calibration, windows=1, window_tokens=_FEW_TOKENS),
        importance={"method": "none"},
    )


def demo_agents(config: Config) -> list[AgentConfig]:
    """Return the agents to train: the configured one, or those that ``demo.agents`` names.

    All get the configured number of steps.
    """
    if not config.demo["agents"]:
        return [config.agent]
    found = []
    for name in config.demo["agents"]:
        node: Any = compose(config_name="train", overrides=[f"agent={name}"])
        agent = OmegaConf.to_object(node.agent)
        assert isinstance(agent, AgentConfig)
        found.append(replace(agent, total_timesteps=config.agent.total_timesteps))
    return found


if __name__ == "__main__":
    launch("demo", demo)
