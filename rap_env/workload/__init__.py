"""Workloads: samplers that draw requests. `SAMPLERS` holds all of them by name."""

from rap_env.workload.sampler import RequestSampler
from rap_env.workload.traffic import SAMPLERS, make_sampler

__all__ = ["SAMPLERS", "RequestSampler", "make_sampler"]
