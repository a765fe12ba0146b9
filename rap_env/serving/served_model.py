"""What a server serves: model, policy and floor of quality, within its limit from the start."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, cast

from rap_env.errors import ServingSettingsError
from rap_env.levels import WEIGHT_LEVELS
from rap_env.memory import MemoryModel
from rap_env.models.device import drop_unused_pages, resident_bytes
from rap_env.models.files.loading import load_llm
from rap_env.models.files.model_folder import made_apart
from rap_env.models.live.elastic import ElasticLLM
from rap_env.paths import any_prepared
from rap_env.policies.base import Policy
from rap_env.policies.loading import load_policy
from rap_env.request import Request, mebibytes
from rap_env.runtime.memory_limit import LiveLimit
from rap_env.runtime.plan_chooser import predicts
from rap_env.serving.settings import DEFAULT_MOST_DELTA_NLL, ServerSettings

if TYPE_CHECKING:
    from rap_env.models.weights.residency import Residency

log = logging.getLogger(__name__)

SHORT_TOKENS = 256
"""Tokens of the request that a server should be able to serve."""
_SLACK_BYTES = 40 * 2**20
"""Allowance for what the estimate of the bytes that loading takes leaves out, such as the
vocabulary of grammars: 10 MiB for the default model's 49,152 tokens."""
_SPREAD_BYTES = 8 * 2**20
"""By how much one start may take more than another."""

_MAKING_BYTES = 32 * 2**20
"""What making a level of a block takes beside the block's weights at both levels."""


def load_served_model(settings: ServerSettings, limit: LiveLimit | None = None) -> ElasticLLM:
    """Load the model and set its residency.

    With a limit of the process, the start is checked before the weights are read; a prepared
    model that would exceed it is loaded on demand, so that its native weights need not fit. A
    model that has to be converted first is converted in another process, whose memory is freed
    with it.
    """
    load = partial(
        load_llm,
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        weights=settings.weights,
        lean=True,
        quick_levels=True,
    )
    with made_apart():
        if limit is None or not limit.of_process:
            llm = load()
        else:
            try:
                llm = load(before_weights=partial(check_start, settings.model, limit))
            except ServingSettingsError:
                prepared = _prepared(load)
                if prepared is None:
                    raise
                return prepared
    llm.set_residency(cast("Residency", settings.residency))
    return llm


def _prepared(load: Callable[..., ElasticLLM]) -> ElasticLLM | None:
    """The model with its blocks in its files, if it has all levels; else its memory is freed."""
    if not any_prepared():
        return None
    llm = load(on_demand=True)
    if llm.calibration and not llm.absent_levels(WEIGHT_LEVELS):
        return llm
    return None


def check_start(model: str, limit: LiveLimit, loading_bytes: int) -> None:
    """Check that the process will stay within its limit while it loads the model.

    Args:
        model: What messages call the model.
        limit: The limit of the process.
        loading_bytes: Bytes that loading still takes at its peak.

    Raises:
        ServingSettingsError: It would not; the message says how much is needed.
    """
    import rap_env.runtime.sampling  # noqa: F401  it takes tens of megabytes

    drop_unused_pages()
    resident = resident_bytes()[1]
    need = resident + loading_bytes + _SLACK_BYTES
    if need > limit():
        need += _SPREAD_BYTES
        raise ServingSettingsError(
            f"memory is {mebibytes(limit())}, but the process needs {mebibytes(need)} to "
            f"start with {model}: {mebibytes(resident)} without it, and "
            f"{mebibytes(need - resident)} while it is loaded. Set memory to at least that, or "
            "model_memory to limit the model alone."
        )


def check_started(model: str, limit: LiveLimit) -> None:
    """Check that the process stayed within its limit while it started.

    Raises:
        ServingSettingsError: It did not; the message says how much it took.
    """
    peak = resident_bytes()[0]
    if peak > limit():
        raise ServingSettingsError(
            f"memory is {mebibytes(limit())}, but the process took {mebibytes(peak)} to start with "
            f"{model}; set memory to at least that, or model_memory to limit the model alone."
        )


def choose_policy(settings: ServerSettings, llm: ElasticLLM, limit: LiveLimit | None) -> Policy:
    """The policy of the settings, without levels that take minutes to make and are not needed.

    They are needed if without them one short request does not fit the limit within the floor.
    """
    facts = replace(llm.facts, name=settings.model)  # messages name commands for it
    load = partial(load_policy, settings.policy, allow_removal=settings.allow_removal)
    chosen = load(MemoryModel(facts))
    if not (absent := llm.absent_levels(chosen.weight_levels)):
        return chosen
    fewer = load(MemoryModel(facts.without_levels(absent)))
    if limit is not None:
        request = _short_request(llm, limit)
        plan = fewer.choose(request)
        rise, floor = fewer.delta_nll(plan, SHORT_TOKENS), floor_of(settings, fewer)
        too_bad = rise is not None and floor is not None and rise > floor
        if too_bad or MemoryModel(llm).peak_bytes(plan, request) > request.budget_bytes:
            return chosen
    log.info(
        "Weights of %s are not used, because they are not made; `rap prepare %s` makes them once, "
        "in minutes.",
        ", ".join(sorted(absent)),
        settings.model,
    )
    return fewer


def lowers_weights(policy: Policy, llm: ElasticLLM, limit: LiveLimit) -> bool:
    """Whether a limit makes a policy lower weights for one short request."""
    plan = policy.choose(_short_request(llm, limit, _MAKING_BYTES))
    return bool(plan.weight_levels)


def _short_request(llm: ElasticLLM, limit: LiveLimit, reserve_bytes: int = 0) -> Request:
    budget_bytes = limit() - (_other_bytes(llm) if limit.of_process else 0)
    tokens = min(SHORT_TOKENS, llm.facts.max_positions)
    return Request(1, tokens, max(1, budget_bytes - reserve_bytes))


def _other_bytes(llm: ElasticLLM) -> int:
    """Bytes of the process now that are not the model's weights and caches."""
    return max(0, resident_bytes()[1] - llm.held_bytes.total)


def floors_of(settings: ServerSettings, policy: Policy) -> tuple[float | None, float | None]:
    """The floor of the settings, and the highest that it rises to with the queue."""
    most = DEFAULT_MOST_DELTA_NLL if settings.max_delta_nll == "auto" else None
    return floor_of(settings, policy), most


def floor_of(settings: ServerSettings, policy: Policy) -> float | None:
    """The floor of the settings; none, with a warning, if it is the default and unpredictable."""
    if settings.max_delta_nll == "auto" and settings.allow_removal:
        return None
    if settings.max_delta_nll != "auto" or predicts(policy):
        return settings.floor_if_predicted
    log.warning(
        "Policy %s predicts no rise in NLL, so answers have no floor of quality; knapsack "
        "predicts it for models with measured level costs.",
        policy.name,
    )
    return None
