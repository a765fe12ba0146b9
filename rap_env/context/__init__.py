"""Pruning contexts: a model (or a table of its scores) with its text, scorer and importance."""

from rap_env.context.base import ContextConfig, PruningContext
from rap_env.context.live import LiveContext
from rap_env.context.opening import open_context, open_store
from rap_env.context.table import TableContext

__all__ = [
    "ContextConfig",
    "LiveContext",
    "PruningContext",
    "TableContext",
    "open_context",
    "open_store",
]
