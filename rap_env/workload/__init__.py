"""Requests, and the samplers that draw them.

A sampler is named by a spec: its name alone (``"azure-conv"``), or a dict with its settings
(``{"name": "fixed", "batch_size": 8, "budget_fraction": 0.7}``). `SAMPLERS` holds them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from rap_env.specs import check_settings, split_spec
from rap_env.workload.listed import FixedSampler, GridSampler
from rap_env.workload.sampler import RequestSampler
from rap_env.workload.shaped import CurriculumSampler, PoolSampler
from rap_env.workload.traffic import (
    AzureCodeSampler,
    AzureConvSampler,
    TraceSampler,
    TrafficSampler,
)

if TYPE_CHECKING:
    from rap_env.memory import MemoryModel

__all__ = [
    "SAMPLERS",
    "AzureCodeSampler",
    "AzureConvSampler",
    "CurriculumSampler",
    "FixedSampler",
    "GridSampler",
    "PoolSampler",
    "RequestSampler",
    "TraceSampler",
    "TrafficSampler",
    "make_sampler",
]

SAMPLERS: dict[str, type[RequestSampler]] = {
    "fixed": FixedSampler,
    "grid": GridSampler,
    "azure-conv": AzureConvSampler,
    "azure-code": AzureCodeSampler,
    "trace": TraceSampler,
    "pool": PoolSampler,
    "curriculum": CurriculumSampler,
}
"""Every sampler by the name that a spec calls it."""


def make_sampler(spec: str | Mapping[str, Any], memory: MemoryModel) -> RequestSampler:
    """The sampler that a spec names.

    Args:
        spec: A name of `SAMPLERS`, or a dict with that ``name`` and the sampler's settings.
        memory: The model's byte arithmetic.

    Raises:
        UnknownNameError: There is no such sampler, or it has no such setting.
        InvalidRequestError: A setting is out of its range.
        TraceError: The trace file of ``"trace"`` is missing, empty or malformed.
    """
    name, settings = split_spec(spec, "sampler", SAMPLERS)
    sampler: Callable[..., RequestSampler] = SAMPLERS[name]
    known = [entry.name for entry in fields(SAMPLERS[name]) if entry.init]  # type: ignore[arg-type]
    known.remove("memory")
    check_settings(settings, f"the sampler {name!r}", known)
    return sampler(memory=memory, **settings)
