"""Steps of both environments with known scores: ``python -m benchmarks.step``.

Record ``step``: with the cached scores of a model, beside CartPole. Record ``table_steps``: of the
pinned tasks on score tables, in CPU seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np

from benchmarks.measuring import Settings, alternate, ratios, spread
from benchmarks.record import Target, write_record
from experiments.study.console import run_with_settings
from rap_env.ladder.features import ImportanceFeatures
from rap_env.memory import MemoryModel
from rap_env.scoring.corpus import Corpus
from rap_env.scoring.scorer import MaskScorer

_CART_POLE = "CartPole-v1"
_MOST_STEPS = 500  # the limit of CartPole-v1, so that both have the same wrappers
TASKS = {"": {"id": "RAPPrune-v0"}, "_ladder": {"id": "RAPLadder-v0", "levels": "four-bits"}}
"""Environments by the suffix of their sides; the tiny model's rows are too short for fewer bits."""
TABLE_TASKS = {"ladder": "RAPLadder/SmolLM2-Table-v1", "prune": "RAPPrune/SmolLM2-Table-v1"}


@dataclass
class StepSettings(Settings):
    """Settings of this benchmark."""

    model: str = "smollm2-135m"
    """Model that gives the number of blocks and their bytes."""
    workload: str = "azure-conv"
    steps: int = 4000
    """Steps of a single environment, repeated `rounds` times in one measurement."""
    num_envs: int = 64
    """Sub-environments of the vector environment."""
    vector_steps: int = 150
    """Steps of the vector environment, repeated `rounds` times in one measurement."""
    rounds: int = 5
    table_steps: int = 400
    """Steps of the vector environment on a score table in one measurement."""


@dataclass(frozen=True, eq=False)
class KnownPruningContext:
    """The bytes of one model and the scorer of another with as many blocks.

    Survives the deep copy that `gymnasium.make` makes of its arguments.
    """

    memory: MemoryModel
    scorer: MaskScorer
    features: ImportanceFeatures
    importance: str = "none"

    def __deepcopy__(self, memo: object) -> KnownPruningContext:
        return self


@dataclass
class Player:
    """Runs the same seeded episodes repeatedly, in any environment.

    Attributes:
        env: A single environment or a vector environment that resets itself.
        rounds: Times that all actions run in one call.
        forget: Forgets the bytes of earlier requests.
    """

    env: Any
    actions: Sequence[Any]
    rounds: int
    forget: Callable[[], None]

    def __call__(self) -> None:
        """One measurement."""
        step, single = self.env.step, isinstance(self.env, gym.Env)
        for _ in range(self.rounds):
            self.forget()  # else a repetition would find each request in the cache
            self.env.reset(seed=0)
            for action in self.actions:
                _, _, terminated, truncated, _ = step(action)
                if single and (terminated or truncated):
                    self.env.reset()


def known_context(settings: StepSettings) -> KnownPruningContext:
    """The default model's blocks and bytes, and a tiny random model that scores masks quickly."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from rap_env.models.files.loading import load_llm
    from rap_env.models.live.elastic import ElasticLLM

    facts = load_llm(settings.model, weights="bf16").facts
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=facts.num_layers,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    models: Any = AutoModelForCausalLM
    tiny = ElasticLLM(models.from_config(config), None, name="tiny")
    scorer = MaskScorer(tiny, Corpus.of_tokens(torch.randint(64, (1, 8))))
    features = ImportanceFeatures.none(facts.num_blocks)
    return KnownPruningContext(MemoryModel(facts), scorer, features)


def players(settings: StepSettings, context: KnownPruningContext) -> dict[str, Player]:
    """Every side of the comparison, by name."""

    def player(make: Callable[..., Any], count: int, **arguments: Any) -> Player:
        env = make(**arguments)
        env.action_space.seed(0)
        actions = [env.action_space.sample() for _ in range(count)]
        task = env.unwrapped.__dict__.get("_task")  # of ours
        forget = (
            (lambda: None) if task is None else task.encoder.ladder_bytes.cached_costs.cache_clear
        )
        return Player(env, actions, settings.rounds, forget)

    sides = {"cart_pole": player(gym.make, settings.steps, id=_CART_POLE)}
    for suffix, task in TASKS.items():
        made = {**task, "context": context, "workload": settings.workload}
        sides[f"single{suffix}"] = player(
            gym.make, settings.steps, **made, max_episode_steps=_MOST_STEPS
        )
        sides[f"vector{suffix}"] = player(
            gym.make_vec, settings.vector_steps, **made, num_envs=settings.num_envs
        )
    return sides


def main(settings: StepSettings) -> None:
    """Measure, and write both records."""
    measure_beside_cart_pole(settings)
    measure_tables(settings)


def measure_beside_cart_pole(settings: StepSettings) -> None:
    """Time steps whose scores are cached, and those of CartPole, and write the record ``step``."""
    from rap_env.models.device import use_threads

    use_threads(settings.threads or 1)  # the timed code does not use torch
    context = known_context(settings)
    sides = players(settings, context)
    seconds = alternate(sides, settings.repeats)  # the warm-up scores all masks
    steps = settings.steps * settings.rounds
    vector_steps = settings.vector_steps * settings.num_envs * settings.rounds
    step_us = {
        name: spread([1e6 * s / steps for s in side_s])
        for name, side_s in seconds.items()
        if not name.startswith("vector")
    }
    per_s = {
        name: spread([vector_steps / s for s in side_s])
        for name, side_s in seconds.items()
        if name.startswith("vector")
    }
    write_record(
        "step",
        device="cpu",
        settings=settings,
        targets=[
            Target.of(
                "times a CartPole step that a known-score step takes, resets included",
                ratios(seconds["single"], seconds["cart_pole"]),
                at_most=4.0,
                against=f"{_CART_POLE}: {step_us['cart_pole']['median']:.1f} µs a step with resets",
            ),
            Target.of(
                f"steps/s of {settings.num_envs} sub-environments, resets included",
                per_s["vector"],
                at_least=100_000.0,
            ),
        ],
        measured={
            "step_us": step_us,
            "vector_steps_per_s": per_s,
            "masks_scored_beforehand": context.scorer.evaluations,
        },
        notes=[
            "The cost of a step depends on the number of blocks, not on the width of the model: "
            f"blocks and bytes are those of {settings.model}, scores those of a tiny random model "
            "with as many blocks, asked for once before the clock runs.",
            "Random actions, invalid ones among them; all single environments come from "
            "gymnasium.make with a limit of 500 steps, so with the same wrappers.",
        ],
    )


def measure_tables(settings: StepSettings) -> None:
    """Time steps on score tables, and write the record ``table_steps``."""
    envs, steps = settings.num_envs, settings.table_steps
    per_s, targets = {}, []
    for task, name in TABLE_TASKS.items():
        env = gym.make_vec(name, num_envs=envs)
        per_s[task] = spread([steps * envs / play(env, steps) for _ in range(settings.repeats)])
        what = f"steps of `{name}` per CPU second, {envs} sub-environments"
        targets.append(Target.of(what, per_s[task], at_least=50_000.0))
    write_record(
        "table_steps",
        device="cpu",
        settings=settings,
        targets=targets,
        measured={"steps_per_cpu_s": per_s},
        notes=["Random valid actions, whose choice does not count."],
    )


def play(env: Any, steps: int) -> float:
    """CPU seconds of steps with random valid actions, whose choice does not count."""
    rng, (observation, _), total_s = np.random.default_rng(0), env.reset(seed=0), 0.0
    for _ in range(steps):
        mask = observation["action_mask"]
        action = (mask * rng.random(mask.shape)).argmax(axis=-1)
        began = time.process_time()
        observation, *_ = env.step(action)
        total_s += time.process_time() - began
    return total_s


if __name__ == "__main__":
    run_with_settings(StepSettings, main)
