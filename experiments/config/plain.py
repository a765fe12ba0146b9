"""Sections that are plain mappings: what each setting may be, and its default."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.config.common import Rule, among, distinct, ending, form, parse_shape, some, within
from experiments.study.experiment_errors import ExperimentError
from rap_env.errors import check_name
from rap_env.importance.level_costs import CACHE_LEVELS
from rap_env.levels import CacheLevel

LEVELS_SUFFIX = ".levels.json"


class Setting(NamedTuple):
    """One setting: its type, as `isinstance` takes it, its default, and a rule for its values.

    The rule of a list is one for its entries; `whole` is one for the list.
    """

    kind: Any
    default: Any
    rule: Rule | None = None
    whole: Rule | None = None


TASKS = {
    "names": Setting(list, []),  # lm-eval tasks; none without names
    "limit": Setting(int | None, None, within(1)),  # documents of each task; null for all
    # Which ones: a sample that the seed draws, or the first ones, as of generated tasks.
    "documents": Setting(str, "sample", among("sample", "first")),
    "data_root": Setting(str | None, None),  # folder with local files of hub tasks, or null
    "num_fewshot": Setting(int, 0, within(0)),
}
"""lm-eval tasks."""

TEACHERS = ("none", "frontier", "greedy", "knapsack", "gsi", "one_shot", "score_model")

PLAIN: dict[str, Mapping[str, Setting]] = {
    # Where plans are measured; the scores do not depend on it.
    "scoring": {
        # Processes that measure, each with a model of its own; 0 measures in this process.
        "workers": Setting(int, 0, within(0)),
        # HOST:PORT of a Ray cluster, or auto for the one on this machine; null starts the workers
        # on this machine.
        "address": Setting(str | None, None),
    },
    # Importance scores that the agent observes.
    "importance": {
        # gsi: greedy sequential importance; one_shot: one measurement for each item; or none.
        "method": Setting(str, "gsi", among("gsi", "one_shot", "none")),
        # Number of blocks that GSI removes; null for all.
        "gsi_removals": Setting(int | None, 16, within(1)),
        # lazy is several times faster than exact.
        "gsi_method": Setting(str, "exact", among("exact", "lazy")),
    },
    # Imitation learning before reinforcement learning.
    "warm_start": {
        # frontier: the table of the best known plans; greedy: greedy searches per byte; the
        # others: the methods of these names.
        "teacher": Setting(str, "none", among(*TEACHERS)),
        "requests": Setting(int, 512, within(1)),  # workload requests that the teacher answers
        "updates": Setting(int, 600, within(1)),  # updates of the network on the teacher's plans
    },
    # Training on predicted scores that are corrected with measured ones after each round.
    "score_model": {
        # Rounds, each of which fits the score model again; the training steps are divided among
        # them. 0 trains on measured scores only.
        "rounds": Setting(int, 0, within(0)),
        # Masks measured before the first round, if no frontier table provides scores.
        "first_masks": Setting(int, 1000, within(1)),
        # Requests on which the policy's plans are measured after each round: for each request the
        # most probable plan, and the best of several sampled ones.
        "verify_requests": Setting(int, 128, within(1)),
        "members": Setting(int, 5, within(1)),  # predictors of the ensemble
        # Standard deviations of the ensemble that are added to a predicted ΔNLL.
        "pessimism": Setting(float | int, 1.0, within(0)),
    },
    # The frontier table that experiments.profile builds.
    "frontier": {
        "evaluations": Setting(int, 0, within(0)),  # plans to score at most; 0 builds no table
        # Pairs of counts whose best mask is expected to have a larger ΔNLL, in nats per token, are
        # left out.
        "deepest_loss": Setting(float | int, 3.0, within(0)),
        # Workload requests that decide which pairs of counts, or which plans, are useful.
        "requests": Setting(int, 512, within(1)),
        # A table of plans of the same model, whose best plans are measured first.
        "start": Setting(str | None, None),
    },
    # Loggers besides metrics.jsonl in the run folder, which is always written.
    "logger": {
        "wandb": Setting(bool, False),  # log to Weights & Biases
        "tensorboard": Setting(bool, False),  # log to TensorBoard
        "project": Setting(str, "rap"),  # project of wandb
        # auto: online if a login is found, else offline.
        "wandb_mode": Setting(str, "auto", among("auto", "online", "offline")),
    },
    # Budgets in bytes at which uniform settings lose given amounts.
    "tight_grid": {
        # Batch size x sequence length in tokens.
        "requests": Setting(
            list, ["1x128", "4x512", "4x2048", "8x2048", "16x4096"], form(parse_shape), distinct
        ),
        # ΔNLL of the best uniform setting on the calibration text, nats per token.
        "losses": Setting(list, [0.05, 0.1, 0.2, 0.5, 1.0, 2.0], within(0, above=True), distinct),
        "out": Setting(str, "conf/grid/tight.yaml"),  # file to write
    },
    # Levels to measure, and plans of the knapsack over them.
    "levels": {
        # Levels of KV caches, such as int4 or int4-window512.
        "caches": Setting(list, list(CACHE_LEVELS), form(CacheLevel.of)),
        # Batch size x sequence length in tokens, for `joint_budgets`.
        "requests": Setting(list, ["1x128"], form(parse_shape), some),
        # Fractions of the unquantised model's peak bytes at which the knapsack's plans are measured
        # on the calibration text, to correct costs.
        "joint_budgets": Setting(list, [], within(0, 1, above=True)),
        # File for the costs of levels, ending in .levels.json; the model's facts are written next
        # to it. null for none.
        "out": Setting(str | None, None, ending(LEVELS_SUFFIX)),
    },
    # experiments.demo.
    "demo": {
        "table": Setting(str, "score_table:smollm2-135m"),  # what the policy is trained on
        "question": Setting(str, "What is the capital of France?"),
        "live_s": Setting(float | int, 60, within(1)),  # seconds of service with moving memory
    },
    # experiments.studies.replay.cgroup: a server and a tenant in one memory cgroup.
    "cgroup": {
        # Servers, one after the other: rap, llama.cpp and transformers.
        "systems": Setting(list, ["rap"]),
        "llama_server": Setting(str, "llama-server"),  # llama.cpp's program
        "limit_mib": Setting(int, 760, within(1)),  # of both together
        "tenant_mib": Setting(list, [50, 280]),  # least and most of the tenant
        "minutes": Setting(float | int, 5, within(0)),
        "clients": Setting(int, 3, within(1)),
    },
    # The score table that experiments.export_scores writes.
    "export": {
        # Masks that the store must have, all or at most half of them; missing ones are measured
        # first. null measures none.
        "masks": Setting(int | None, None, within(1)),
        # Whether it has the costs of levels and measured plans, as RAPLadder-v0 needs.
        "levels": Setting(bool, False),
        # Folders of comparisons on the same model and text, whose measured scores are added.
        "records": Setting(list, []),
        "path": Setting(str | None, None),  # the table's file; null for one in the run folder
    },
}
"""The plain sections by name."""


def defaults(settings: Mapping[str, Setting]) -> dict[str, Any]:
    """Return the default of each setting."""
    return {name: copy.copy(setting.default) for name, setting in settings.items()}


def completed(
    section: str, given: Mapping[str, Any], settings: Mapping[str, Setting]
) -> dict[str, Any]:
    """Return all settings of a plain section.

    Raises:
        UnknownNameError: A name is misspelt.
        ExperimentError: A value has the wrong type or is not allowed.
    """
    for name, value in given.items():
        check_name(f"setting of {section}", name, settings)
        setting = settings[name]
        if not isinstance(value, setting.kind):
            kind = setting.kind.__name__ if isinstance(setting.kind, type) else setting.kind
            raise ExperimentError(f"{section}.{name} must be of type {kind}, not {value!r}.")
        if setting.whole:
            setting.whole(f"{section}.{name}", value)
        if setting.rule and value is not None:
            for entry in value if isinstance(value, list) else [value]:
                setting.rule(f"{section}.{name}", entry)
    return defaults(settings) | dict(given)
