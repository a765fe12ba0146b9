"""Workloads: samplers that draw requests. `SAMPLERS` holds all of them by name."""

from rap_env.workload.registry import SAMPLERS, make_sampler
from rap_env.workload.sampler import RequestSampler

__all__ = ["SAMPLERS", "RequestSampler", "make_sampler"]
