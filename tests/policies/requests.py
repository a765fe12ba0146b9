"""Requests on which methods choose, and whether a plan fits one. Without torch."""

from rap_env.request import Request

SHAPES = ((1, 100), (16, 500))
"""Requests at which weights, or caches, are most of the bytes."""


def needing(context, bytes_over, seq_len_tokens=1):
    """A short request that is over its budget by so many bytes."""
    dense = context.memory.native_peak_bytes(1, seq_len_tokens)
    return Request(1, seq_len_tokens, dense - bytes_over)


def fits(context, plan, request):
    return context.memory.peak_bytes(plan, request) <= request.budget_bytes
