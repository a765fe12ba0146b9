"""Golden episodes of both tasks: what they must return, whatever computes it.

``python -m tests.envs.golden`` writes the record again; `tests.envs.test_golden` compares with it.
Each episode is a line: steps, return, sum of peak bytes, and a digest of all that `reset` and
`step` returned. Floats of rewards and infos are rounded to 12 decimals, arrays of observations are
compared bit for bit.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import numpy as np

from rap_env.ladder.features import ImportanceFeatures
from rap_env.memory import MemoryModel, ModelFacts
from rap_env.plan import block_name

PATH = Path(__file__).with_name("golden.json.gz")
SEEDS = {"prune": 200, "ladder": 50}
IDS = {"prune": "RAPPrune-v0", "ladder": "RAPLadder-v0"}

LAYERS = 5
MADE = ModelFacts(
    name="made",
    fingerprint="a" * 64,
    dtype="bfloat16",
    block_param_bytes=tuple(40_000 + 10_000 * (i % 3) for i in range(2 * LAYERS)),
    base_bytes=90_000,
    kv_bytes_per_token=(256, 128, 512, 256, 128),
    kv_window_tokens=(None, 700, None, 40, None),
    itemsize=2,
    hidden_size=4,
    ffn_width=40,
    vocab_size=100,
    max_positions=4096,
    level_param_bytes={
        "int8": tuple(20_000 + 5_000 * (i % 3) for i in range(2 * LAYERS)),
        "int4": tuple(11_000 + 2_700 * (i % 3) for i in range(2 * LAYERS)),
    },
    level_base_bytes={"int8": 45_000},
    widen_bytes=700,
    kv_heads=(2, 1, 4, 2, 1),
    kv_head_size=(32,) * LAYERS,
)
MADE_WORKLOAD = {
    "name": "grid", "batch_sizes": [1, 4, 16], "seq_lens_tokens": [30, 500, 3000],
    "budget_fractions": [0.15, 0.35, 0.55, 0.75],
}  # fmt: skip
FEW = {"weights": ["removed"], "caches": ["int8", "int4", "int4-window128"], "embeddings": ["int8"]}

VARIANTS: dict[str, dict[str, list[dict[str, Any]]]] = {
    "prune": {
        "score_table:smollm2-135m": [
            {},
            {"reward": {"name": "perplexity", "timing": "dense", "relative_to": "gsi"}},
            {"reward": {"name": "perplexity", "relative_to": "one_shot", "scale": "log"}},
            {"infeasible": "clip", "info": "arrays", "importance": "one_shot"},
            {"importance": "none", "max_steps": 12},
        ],
        "made": [
            {"infeasible": "clip", "max_invalid_actions": 1},
            {"infeasible": "clip", "max_steps": 4, "info": "arrays"},
            {"infeasible": "clip", "reward": {"name": "perplexity", "timing": "dense"}},
        ],
    },
    "ladder": {
        "score_table:smollm2-135m": [
            {},
            {"workload": {"name": "tight"}, "info": "arrays", "max_steps": 30},
            {"reward": {"name": "perplexity", "timing": "dense", "relative_to": "one_shot"}},
        ],
        "score_table:gemma3-270m": [
            {"levels": "masks", "importance": "none", "workload": "azure-conv"},
            {"together": ["int8"], "max_invalid_actions": 3},
        ],
        "made": [
            {"importance": "none"},
            {"importance": "none", "levels": FEW, "together": [], "info": "arrays"},
            {"importance": "none", "levels": "masks", "max_steps": 5},
            {"importance": "none", "levels": "caches", "infeasible": "error"},
        ],
    },
}

VECTOR_VARIANTS: list[dict[str, Any]] = [
    {"autoreset_mode": "NextStep"},
    {"autoreset_mode": "SameStep", "info": "arrays"},
    {"autoreset_mode": "Disabled", "max_steps": 9},
]


class FakeScorer:
    """NLL is a sum of costs of items and levels, which their names give."""

    native_nll = 3.0
    evaluations = 0

    def nll(self, plan: Any) -> float:
        """The NLL of a plan."""
        return self.native_nll + math.fsum(
            _cost(item) * (1 + len(level) / 7) for item, level in plan.levels.items()
        )

    def nll_many(self, plans: Any) -> list[float]:
        """The NLL of each plan."""
        return list(map(self.nll, plans))

    def is_predicted(self, plan: Any) -> bool:
        """Odd numbers of lowered items count as predicted."""
        return len(plan.levels) % 2 == 1


def _cost(item: str) -> float:
    return int(hashlib.sha256(item.encode()).hexdigest()[:6], 16) / 2**24


def made_context() -> Any:
    """A fake context on the made model."""
    count = MADE.num_blocks
    costs = np.array([_cost(block_name(index)) for index in range(count)])
    features = ImportanceFeatures(costs, np.arange(count) / (count - 1), costs[::-1] - 0.2)
    return SimpleNamespace(
        memory=MemoryModel(MADE), scorer=FakeScorer(), features=features, importance="none"
    )


class Shared:
    """A context that survives the deep copy of `gymnasium.make`."""

    def __init__(self, context: Any) -> None:
        self.__dict__.update(vars(context))

    def __deepcopy__(self, memo: object) -> Shared:
        return self


def arguments_of(task: str, model: str, variant: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `gymnasium.make` or `make_vec`."""
    if task == "ladder":  # as the record was made
        variant = {"over_budget": "measured", **variant}
    if model != "made":
        return {"id": IDS[task], "model": model, **variant}
    workload = {"workload": MADE_WORKLOAD}
    return {"id": IDS[task], "context": Shared(made_context()), **workload, **variant}


def plain(value: Any) -> Any:
    """A value as JSON with its types, in which floats have 12 decimals."""
    kind = type(value).__name__
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, np.ndarray):
        if value.dtype == object:
            return [kind, plain(value.tolist())]
        if value.dtype == np.float64:
            value = np.round(value, 12) + 0.0
        return [value.dtype.str, value.shape, hashlib.sha256(value.tobytes()).hexdigest()[:16]]
    if isinstance(value, bool | str | None):
        return value
    if isinstance(value, float):
        return [kind, repr(round(float(value), 12) + 0.0)]
    return [kind, int(value)]


def digest(values: Any) -> str:
    """12 hex digits of a hash of values."""
    text = json.dumps(plain(values), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def play_episode(env: Any, seed: int) -> str:
    """One episode of random actions, most of them valid, as a line of the record."""
    rng = np.random.default_rng(seed)
    results: list[Any] = [env.reset(seed=seed)]
    total, peaks, over = 0.0, results[0][1]["peak_bytes"], False
    while not over:
        valid = np.flatnonzero(env.unwrapped.action_masks())
        usual = rng.random() < 0.9
        action = rng.choice(valid) if usual else rng.integers(env.action_space.n)
        results.append(env.step(action))
        _, reward, terminated, truncated, info = results[-1]
        total, peaks, over = total + reward, peaks + info["peak_bytes"], terminated or truncated
    return f"{len(results) - 1} {total:.9f} {peaks} {digest(results)}"


def play_vector(envs: Any, seed: int, steps: int = 60) -> list[str]:
    """Steps of a vector environment: the sum of peak bytes and a digest for each ten steps."""
    rng = np.random.default_rng(seed)
    results: list[Any] = [envs.reset(seed=seed)]
    lines = []
    for number in range(1, steps + 1):
        masks = envs.unwrapped.action_masks()
        valid = np.where(masks, rng.random(masks.shape), -1.0).argmax(axis=1)
        usual = rng.random(len(masks)) < 0.9
        actions = np.where(usual, valid, rng.integers(masks.shape[1], size=len(masks)))
        results.append(envs.step(actions))
        over = results[-1][2] | results[-1][3]
        if envs.metadata["autoreset_mode"].value == "Disabled" and over.any():
            results.append(envs.reset(options={"reset_mask": over}))
        if number % 10 == 0:
            peaks = sum(int(result[-1]["peak_bytes"].sum()) for result in results)
            lines.append(f"{peaks} {digest(results)}")
            results = []
    return lines


def episodes(task: str, model: str, every: int = 1) -> list[str]:
    """The lines of single episodes, with every n-th seed only."""
    variants = VARIANTS[task][model]
    envs = [gym.make(**arguments_of(task, model, variant)) for variant in variants]
    return [play_episode(envs[seed % len(envs)], seed) for seed in range(0, SEEDS[task], every)]


def vector_episodes(task: str, model: str) -> list[list[str]]:
    """The lines of vector environments."""
    lines = []
    for number, variant in enumerate(VARIANTS[task][model]):
        arguments = arguments_of(task, model, {**variant, **VECTOR_VARIANTS[number % 3]})
        lines.append(play_vector(gym.make_vec(num_envs=6, **arguments), number))
    return lines


def errors(task: str) -> dict[str, str]:
    """The type and the text of the error of each usual misuse."""
    table = "score_table:smollm2-135m"

    def make(**settings: Any) -> Any:
        return gym.make(IDS[task], model=table, **settings, disable_env_checker=True).unwrapped

    def vector(**settings: Any) -> Any:
        return gym.make_vec(IDS[task], num_envs=3, model=table, **settings)

    def reset(request: Any, **settings: Any) -> Any:
        return make(**settings).reset(seed=0, options={"request": request})

    def started(env: Any, **settings: Any) -> Any:
        env.reset(seed=0, **settings)
        return env

    def ended() -> Any:
        env = make(max_steps=1)
        env.reset(seed=0)
        env.step(0)
        return env.step(1)

    def ended_vector() -> Any:
        envs = vector(autoreset_mode="Disabled", max_steps=1)
        envs.reset(seed=0)
        envs.step(np.zeros(3, dtype=int))
        return envs.step(np.ones(3, dtype=int))

    shape = {"batch_size": 2, "seq_len_tokens": 512}
    misuses: dict[str, Any] = {
        "before reset": lambda: make().step(0),
        "masks before reset": lambda: make().action_masks(),
        "after the end": ended,
        "unknown option": lambda: make().reset(options={"budget": 1}),
        "options": lambda: make().reset(options=3),
        "context": lambda: make(context=3),
        "vector before reset": lambda: vector().step(np.zeros(3, dtype=int)),
        "vector after the end": ended_vector,
        "vector shape": lambda: started(vector()).step(np.zeros(2, dtype=int)),
        "vector action": lambda: started(vector()).step(np.array([0, 1, 999])),
        "vector dtype": lambda: started(vector()).step(np.zeros(3)),
        "vector seeds": lambda: vector().reset(seed=[1, 2]),
        "vector flags": lambda: vector().reset(options={"reset_mask": np.ones(2, dtype=bool)}),
        "vector no flags": lambda: vector().reset(options={"reset_mask": np.zeros(3, dtype=bool)}),
        "vector some first": lambda: vector().reset(
            options={"reset_mask": np.array([True, False, True])}
        ),
        "vector mode": lambda: vector(autoreset_mode="never"),
        "vector limit": lambda: vector(max_episode_steps=0),
        "vector unknown argument": lambda: vector(modle="x"),
    }
    for action in (999, -1, 1.5, "x", True, np.array([1, 2]), None):
        misuses[f"action {action}"] = lambda action=action: started(make()).step(action)
    requests: list[Any] = [
        3, {}, shape, {**shape, "budget_bytes": 5, "budget_fraction": 0.5},
        {**shape, "budget_fraction": 1.5}, {**shape, "budget_fraction": 0},
        {**shape, "budget_bytes": 10**6}, {**shape, "budget_fraction": 1.0},
        {**shape, "batch_size": 0, "budget_fraction": 0.5},
        {**shape, "batch_size": 1.5, "budget_fraction": 0.5},
        {**shape, "seq_len_tokens": 10**6, "budget_fraction": 0.5},
        {**shape, "budget_fraction": 0.5, "length": 3},
    ]  # fmt: skip
    for request in requests:
        misuses[f"request {request}"] = lambda request=request: reset(request, infeasible="error")
    settings: list[dict[str, Any]] = [
        {"modle": "x"}, {"infeasible": "x"}, {"info": "x"}, {"max_steps": 0}, {"max_steps": 1.5},
        {"invalid_action_penalty": -1}, {"max_invalid_actions": 0}, {"render_mode": "x"},
        {"reward": "x"}, {"reward": {"name": "perplexity", "timing": "x"}},
        {"reward": {"name": "perplexity", "relative_to": "x"}}, {"workload": "x"},
        {"importance": "none", "reward": {"name": "perplexity", "relative_to": "gsi"}},
    ]  # fmt: skip
    if task == "ladder":
        settings += [
            {"levels": "x"}, {"levels": {"weights": ["int4", "int8"]}}, {"together": "int8"},
            {"levels": {}}, {"gsi_removals": 3}, {"together": ["int3"]},
            {"levels": {"weights": "int8"}}, {"levels": {"blocks": []}}, {"levels": 3},
        ]  # fmt: skip
    for given in settings:
        misuses[f"settings {given}"] = lambda given=given: make(**given)
    return {name: _error_of(misuse) for name, misuse in misuses.items()}


def _error_of(misuse: Any) -> str:
    try:
        misuse()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        # Without the names of all settings, of which one may come or go.
        return re.sub(r"(setting of the environment: .*; known are )'[^.]*'\.", r"\1...", text)
    return "no error"


def record() -> dict[str, Any]:
    """All golden values."""
    return {
        task: {
            "episodes": {model: episodes(task, model) for model in models},
            "vectors": {model: vector_episodes(task, model) for model in models},
            "errors": errors(task),
        }
        for task, models in VARIANTS.items()
    }


def load() -> dict[str, Any]:
    """The recorded values."""
    recorded: dict[str, Any] = json.loads(gzip.decompress(PATH.read_bytes()))
    return recorded


if __name__ == "__main__":
    text = json.dumps(record(), indent=0, sort_keys=True)
    PATH.write_bytes(gzip.compress(text.encode(), mtime=0))
