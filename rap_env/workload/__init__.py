"""Workloads: samplers that draw requests. `SAMPLERS` holds all of them by name."""

from rap_env.workload.registry import SAMPLERS, CurriculumSampler, PoolSampler, make_sampler
from rap_env.workload.sampler import FixedSampler, GridSampler, RequestSampler
from rap_env.workload.traffic import (
    AzureCodeSampler,
    AzureConvSampler,
    TraceSampler,
    TrafficSampler,
)

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
