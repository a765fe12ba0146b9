"""Time of a decision: exported policy against stable-baselines3: ``python -m benchmarks.decide``.

Every decision includes all of its work: the bytes of the request, its observation, and a pass of
the network for each action: a removed block, or a lowered item of a policy of `RAPPrune-v1` (with
``weights=native``). Nothing is cached from earlier requests. Set
``OMP_NUM_THREADS=1`` for one core: NumPy reads it at its import.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import harness
from benchmarks.record import write_record
from rap_env.costs import request_costs
from rap_env.errors import InvalidRequestError
from rap_env.ladder.item_observation import ItemObservationBuilder
from rap_env.memory import MemoryModel
from rap_env.observation import ObservationBuilder
from rap_env.plan import MaskOrPlan, as_plan
from rap_env.request import Request
from rap_env.runtime.ladder_policy import LadderPolicy
from rap_env.runtime.policies import NetworkPolicy, load_policy

if TYPE_CHECKING:
    from stable_baselines3.common.policies import BasePolicy

    from rap_env.runtime.policy_network import NetworkWeights

_MOST_MS = 5.0


@dataclass
class DecideSettings(harness.ModelSettings):
    """Settings of this benchmark."""

    threads: int | None = 1
    policy: str = "rap-v0"
    """``rap-v0``, the policy that comes with the package, or the path of an exported one."""
    weights: str = "bf16"
    """How the model is loaded, as the policy's was."""
    requests: list[str] = field(
        default_factory=lambda: ["1x128", "1x2048", "4x512", "4x1024", "8x1024", "8x2048"]
    )
    """Batch size x sequence length in tokens."""
    budgets: list[float] = field(
        default_factory=lambda: [0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55]
    )
    """Budgets as shares of the dense peak, each combined with every request."""
    rounds: int = 9
    """Times that all requests are decided in one measurement."""


@dataclass(eq=False)
class Side:
    """One side of the comparison.

    Attributes:
        rounds: Times that all requests are decided in one call.
        forget: Drops what earlier decisions may have cached.
        plans: The masks or plans of the last call.
        milliseconds: Wall time of each decision, a list for each call.
        cpu_milliseconds: Processor time of each decision, without that of other processes.
    """

    choose: Callable[[Request], MaskOrPlan]
    requests: Sequence[Request]
    rounds: int
    forget: Callable[[], None] = request_costs.cache_clear
    plans: list[MaskOrPlan] = field(default_factory=list)
    milliseconds: list[list[float]] = field(default_factory=list)
    cpu_milliseconds: list[list[float]] = field(default_factory=list)

    def __call__(self) -> None:
        """One measurement."""
        wall, cpu, self.plans = [], [], []
        for request in [*self.requests] * self.rounds:
            self.forget()  # live requests rarely repeat a length
            began, began_cpu = time.perf_counter(), time.thread_time()
            plan = self.choose(request)
            cpu.append(1000 * (time.thread_time() - began_cpu))
            wall.append(1000 * (time.perf_counter() - began))
            self.plans.append(plan)
        self.milliseconds.append(wall)
        self.cpu_milliseconds.append(cpu)

    def quantiles(self, repeats: int) -> dict[str, dict[str, float]]:
        """Quantiles of the milliseconds over the last `repeats` calls, by name.

        ``p50`` and ``p99`` are over the requests, each at the median of its rounds, so that they
        show expensive requests and not moments of other load on the machine; ``any_p99`` is over
        all single decisions.
        """
        found = {}
        kinds = {"": self.milliseconds, "cpu_": self.cpu_milliseconds}
        for kind, calls in kinds.items():
            each = np.array(calls[-repeats:]).reshape(repeats, self.rounds, len(self.requests))
            typical, single = np.median(each, axis=1), each.reshape(repeats, -1)
            for label, values, share in (
                ("p50", typical, 0.5), ("p99", typical, 0.99), ("any_p99", single, 0.99),
            ):  # fmt: skip
                found[f"{kind}{label}_ms"] = harness.spread(
                    np.quantile(values, share, axis=1).tolist()
                )
        return found


def main(settings: DecideSettings) -> None:
    """Measure, and write the record."""
    from agents.trained_policy import TrainedPolicy

    memory = MemoryModel(harness.open_model(settings, settings.weights).facts)
    policy = load_policy(settings.policy, memory)
    builder: ObservationBuilder | ItemObservationBuilder
    forget: Callable[[], None] = request_costs.cache_clear
    if isinstance(policy, LadderPolicy):
        policy = LadderPolicy(memory, policy.file, cached_choices=0)
        builder, forget = policy.builder, partial(_forget_costs, policy.builder)
    elif isinstance(policy, NetworkPolicy):
        policy = NetworkPolicy(memory, policy.file, cached_choices=0)
        builder = ObservationBuilder(memory, policy.file.features)
    else:
        raise InvalidRequestError(f"policy={settings.policy} is no network; give an exported one.")
    trained = TrainedPolicy(torch_policy(policy.file.weights, builder), builder)
    requests = _requests(settings, memory)
    sides = {
        "exported": Side(policy.choose, requests, settings.rounds, forget),
        "torch": Side(trained.choose, requests, settings.rounds, forget),
    }
    seconds: dict[str, list[float]] = harness.alternate(sides, settings.repeats)
    _write(settings, builder, sides, seconds)


def _forget_costs(builder: ItemObservationBuilder) -> None:
    builder.item_bytes.cached_costs.cache_clear()
    builder.rows_of.cache_clear()


def torch_policy(
    weights: NetworkWeights, builder: ObservationBuilder | ItemObservationBuilder
) -> BasePolicy:
    """The policy of stable-baselines3 with an exported one's weights; its critic is untrained."""
    import torch
    from gymnasium import spaces

    from agents.sb3_policies import MaskableBlockwisePolicy
    from agents.settings import PolicySettings

    settings = PolicySettings(weights.hidden, weights.block_vectors, weights.without)
    made: Any = MaskableBlockwisePolicy(
        builder.space,
        spaces.Discrete(_count(builder)),
        lambda _: 0.0,
        **settings.policy_kwargs(),
    )
    actor = made.mlp_extractor.actor
    given = {
        actor.net[0].weight: weights.first_weight,
        actor.net[0].bias: weights.first_bias,
        actor.net[2].weight: weights.second_weight,
        actor.net[2].bias: weights.second_bias,
        actor.net[4].weight: weights.last_weight[None],
        actor.linear.weight: weights.linear_weight[None],
    }
    if weights.block_vectors:
        given[made.features_extractor.vectors] = weights.vectors
    with torch.no_grad():
        for parameter, array in given.items():
            parameter.copy_(torch.from_numpy(array))
    policy: BasePolicy = made
    return policy


def _count(builder: ObservationBuilder | ItemObservationBuilder) -> int:
    """Number of blocks or items."""
    return int(builder.space["action_mask"].shape[0])  # type: ignore[index]


def _requests(settings: DecideSettings, memory: MemoryModel) -> list[Request]:
    """All pairs of a request and a budget."""
    shapes = [harness.parse_request(text) for text in settings.requests]
    return [Request.at_fraction(memory, *s, budget) for s in shapes for budget in settings.budgets]


def _write(
    settings: DecideSettings,
    builder: ObservationBuilder | ItemObservationBuilder,
    sides: dict[str, Side],
    seconds: dict[str, list[float]],
) -> None:
    exported, torch = sides["exported"], sides["torch"]
    lowered = [len(as_plan(plan).levels) for plan in exported.plans]
    pairs = list(zip(exported.plans, torch.plans, strict=True))
    count, decisions = _count(builder), len(exported.requests)
    what, done, plans = "blocks", "removed", "masks"
    if isinstance(builder, ItemObservationBuilder):
        what, done, plans = "items", "lowered", "plans"
    quantiles = {name: side.quantiles(settings.repeats) for name, side in sides.items()}
    torch_ms = quantiles["torch"]["p50_ms"]["median"]
    write_record(
        "decide" if what == "blocks" else "decide_items",
        device="cpu",
        settings=settings,
        targets=[
            harness.Target.of(
                f"ms of a decision on {count} {what}, p99 of {decisions} requests",
                quantiles["exported"]["p99_ms"],
                at_most=_MOST_MS,
            ),
            harness.Target.of(
                "times as fast as the same network in torch",
                harness.ratios(seconds["torch"], seconds["exported"]),
                at_least=1.0,
                against=f"stable-baselines3: {torch_ms:.1f} ms at the median",
            ),
        ],
        measured={
            **quantiles,
            f"{what}_{done}_mean": float(np.mean(lowered)),
            f"{what}_{done}_most": max(lowered),
            f"same_{plans}_share": float(np.mean([a == b for a, b in pairs])),
        },
        notes=[
            "With the bytes of the request, its observation and a pass for each action; "
            "nothing is kept from one decision to the next.",
            f"p50 and p99 over the requests, each at the median of its {settings.rounds} rounds; "
            "any_p99 over all single decisions; cpu: without what other processes took of the "
            "core.",
        ],
    )


if __name__ == "__main__":
    harness.launch(DecideSettings, main)
