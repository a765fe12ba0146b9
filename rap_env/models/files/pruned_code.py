"""The code and config of a pruned checkpoint, with which transformers and vLLM open it.

`code_files` derives a model class from that of the family; its constructor leaves the removed
blocks out. Their placeholders are a copy of `families.placeholders`. vLLM's
``DeciLMForCausalLM`` reads from the config's ``block_configs`` which blocks of each layer are
left out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rap_env.errors import UnsupportedModelError
from rap_env.models.families import placeholders
from rap_env.models.families.adapter import FamilyAdapter
from rap_env.plan import Plan, block_index
from rap_env.version import __version__

LLAMA_LIKE = ("llama", "mistral", "qwen2")
"""Model types whose blocks are those of Llama, some with biases: what other engines can
prune."""

VLLM_ENTRIES = ("block_configs", "qkv_bias")
"""Entries that `vllm_entries` adds to those of the family, beside ``architectures``."""

_ARCHITECTURE = "DeciLMForCausalLM"


def vllm_entries(adapter: FamilyAdapter, removed: Plan) -> dict[str, Any]:
    """The entries for a model without some blocks.

    Args:
        adapter: Of the model.
        removed: The removed blocks.
    """
    config = adapter.config
    if adapter.model_type not in LLAMA_LIKE:
        raise UnsupportedModelError(
            f"vLLM can only leave blocks out of models like Llama, and {adapter.model_type} is "
            f"none; known are {', '.join(LLAMA_LIKE)}."
        )
    if any(window is not None for window in adapter.kv_window_tokens):
        raise UnsupportedModelError(
            f"vLLM's {_ARCHITECTURE} has no sliding window, and this {adapter.model_type} has one."
        )
    first = next((i for i in range(adapter.num_blocks) if i not in removed.removed), None)
    if first is None or first % 2:
        raise UnsupportedModelError(
            f"vLLM's {_ARCHITECTURE} cannot start with a feed-forward block: its norm expects the "
            "residual stream of an attention block before it. Keep the first attention block."
        )
    group = config.num_attention_heads // adapter.kv_heads
    is_removed = [index in removed.removed for index in range(adapter.num_blocks)]
    blocks = [
        {
            "attention": {"no_op": attn, "n_heads_in_group": None if attn else group},
            "ffn": {"no_op": ffn, "intermediate_size": None if ffn else adapter.ffn_width},
        }
        for attn, ffn in zip(is_removed[::2], is_removed[1::2], strict=True)
    ]
    entries: dict[str, Any] = {"architectures": [_ARCHITECTURE], "block_configs": blocks}
    # Biases of queries, keys and values, but not of the output.
    if adapter.model_type == "qwen2":
        entries["qkv_bias"] = True
    return entries


MODEL_TYPE = "rap_pruned"
"""Model type in the config of pruned checkpoints, which transformers alone does not know."""

REMOVED_ENTRY = "removed_blocks"
"""Entry of the config with the removed blocks; see
`models.families.placeholders.remove_blocks`."""

_CODE, _PLACEHOLDERS = "modeling_rap_pruned", "rap_placeholders"
_CONFIG_CLASS, _MODEL_CLASS = "RapPrunedConfig", "RapPrunedForCausalLM"

_TEMPLATE = Path(__file__).with_name(f"{_CODE}.txt")
"""The module's code, with the names of the family's classes left open."""


def code_files(model: Any) -> dict[str, str]:
    """The content of the Python files for a model of transformers, by name."""
    code = _TEMPLATE.read_text(encoding="utf-8").format(
        config=type(model.config).__name__,
        model=type(model).__name__,
        version=__version__,
        placeholders=_PLACEHOLDERS,
        config_class=_CONFIG_CLASS,
        model_class=_MODEL_CLASS,
        model_type=MODEL_TYPE,
        entry=REMOVED_ENTRY,
    )
    source = Path(placeholders.__file__).read_text(encoding="utf-8")
    return {f"{_CODE}.py": code, f"{_PLACEHOLDERS}.py": source}


def with_code(
    entries: Mapping[str, Any], removed: Mapping[str, Any], adapter: FamilyAdapter
) -> dict[str, Any]:
    """Entries of a config that lead transformers to the code, and vLLM to its own.

    Args:
        entries: The entries of the family's config.
        removed: What `removed_entries` returned.
        adapter: Of the model.
    """
    more: dict[str, Any] = {"architectures": [_MODEL_CLASS]}
    with contextlib.suppress(UnsupportedModelError):
        more = vllm_entries(adapter, Plan.removing(*removed))
    auto_map = {
        "AutoConfig": f"{_CODE}.{_CONFIG_CLASS}",
        "AutoModelForCausalLM": f"{_CODE}.{_MODEL_CLASS}",
    }
    return {
        **entries,
        **more,
        "model_type": MODEL_TYPE,
        "auto_map": auto_map,
        REMOVED_ENTRY: dict(removed),
    }


def without_code(entries: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """The entries of the family's config again, from those that `with_code` returned."""
    own = {"architectures", "auto_map", REMOVED_ENTRY, *VLLM_ENTRIES}
    return {k: v for k, v in entries.items() if k not in own} | {"model_type": model_type}


def removed_entries(adapter: FamilyAdapter, removed: Iterable[str]) -> dict[str, list[str]]:
    """What `remove_blocks` takes, for the names of blocks."""
    return {name: list(adapter.module_paths(block_index(name))) for name in removed}
