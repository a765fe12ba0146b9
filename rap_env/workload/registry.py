"""All request samplers by name.

A spec names a sampler: its name alone (``"azure-conv"``), or a dict with its settings
(``{"name": "fixed", "batch_size": 8, "budget_fraction": 0.7}``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

from rap_env.memory import MemoryModel
from rap_env.specs import check_settings, split_spec
from rap_env.workload.sampler import FixedSampler, GridSampler, RequestSampler, TightSampler
from rap_env.workload.traffic import AzureCodeSampler, AzureConvSampler, TraceSampler

SAMPLERS: dict[str, type[RequestSampler]] = {
    "fixed": FixedSampler,
    "grid": GridSampler,
    "tight": TightSampler,
    "azure-conv": AzureConvSampler,
    "azure-code": AzureCodeSampler,
    "trace": TraceSampler,
}
"""Every sampler by its name in specs."""


def make_sampler(spec: str | Mapping[str, Any], memory: MemoryModel) -> RequestSampler:
    """Make the sampler that a spec names.

    Args:
        spec: A name of `SAMPLERS`, or a dict with that ``name`` and the sampler's settings.
        memory: The model's byte arithmetic.

    Raises:
        UnknownNameError: There is no such sampler, or it has no such setting.
        InvalidRequestError: A setting is out of its range.
        TraceError: The trace file of ``"trace"`` is missing, empty or malformed.
    """
    name, settings = parse_sampler(spec)
    sampler: Callable[..., RequestSampler] = SAMPLERS[name]
    return sampler(memory=memory, **settings)


def parse_sampler(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Name and settings of the sampler that a spec names; their values are not checked.

    Raises:
        UnknownNameError: There is no such sampler, or it has no such setting.
        InvalidRequestError: The spec is neither a name nor a dict.
    """
    name, settings = split_spec(spec, "sampler", SAMPLERS)
    known = [entry.name for entry in fields(SAMPLERS[name]) if entry.init]  # type: ignore[arg-type]
    known.remove("memory")
    check_settings(settings, f"the sampler {name!r}", known)
    return name, settings
