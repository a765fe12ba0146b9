"""Pruning contexts: a model (or a table of its scores), its text, scores and importance."""

from rap_env.context.live import ContextConfig, PruningContext, open_context

__all__ = ["ContextConfig", "PruningContext", "open_context"]
