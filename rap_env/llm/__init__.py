"""The only room that knows transformers' insides. Importing it loads neither torch nor them.

The names below are imported from their modules on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rap_env.llm.adapter import FamilyAdapter, adapter_for
    from rap_env.llm.elastic import ElasticLLM
    from rap_env.llm.loading import load_llm, shared_llm
    from rap_env.llm.streamed import StreamedLLM, stream_llm
    from rap_env.llm.surgery import load_pruned, save_pruned

__all__ = [
    "ElasticLLM",
    "FamilyAdapter",
    "StreamedLLM",
    "adapter_for",
    "load_llm",
    "load_pruned",
    "save_pruned",
    "shared_llm",
    "stream_llm",
]

_MODULES = {
    "ElasticLLM": "elastic",
    "FamilyAdapter": "adapter",
    "StreamedLLM": "streamed",
    "adapter_for": "adapter",
    "load_llm": "loading",
    "load_pruned": "surgery",
    "save_pruned": "surgery",
    "shared_llm": "loading",
    "stream_llm": "streamed",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
