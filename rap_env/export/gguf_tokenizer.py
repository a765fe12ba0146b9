"""A tokenizer of transformers as entries of a GGUF header.

llama.cpp has its own tokenizers: for byte-level BPE it splits text by rules that it has under a
name (``tokenizer.ggml.pre``). Only tokenizers whose rules have such a name are written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from gguf import GGUFValueType as Value

from rap_env.errors import UnsupportedModelError

Entry = tuple[Any, Value, Value | None]
"""Value, type, and the type of an array's elements."""

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # token types

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLITS: dict[str, tuple[tuple[str, Any], ...]] = {
    "gpt-2": (("ByteLevel", True),),
    "smollm": (("Digits", True), ("ByteLevel", True)),
    "llama-bpe": (("Split", _WORDS % "{1,3}"), ("ByteLevel", False)),
    "qwen2": (("Split", _WORDS % ""), ("ByteLevel", False)),
}
"""llama.cpp's names of rules: the steps of each, with what sets them apart."""


def tokenizer_entries(tokenizer: Any, vocab_size: int) -> dict[str, Entry]:
    """The entries of a tokenizer; without a tokenizer those of a file that has only token ids.

    Args:
        tokenizer: A fast tokenizer of transformers, or None.
        vocab_size: Rows of the model's embeddings; missing tokens are padded.

    Raises:
        UnsupportedModelError: It is no byte-level BPE, its rules have no name in llama.cpp, or it
            has more tokens than there are rows.
    """
    if tokenizer is None:
        return {"tokenizer.ggml.model": ("no_vocab", Value.STRING, None)}
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = _name_of_rules(backend)
    texts, types = _tokens(tokenizer, vocab_size)
    merges = [m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"]]
    entries: dict[str, Entry] = {
        "tokenizer.ggml.model": ("gpt2", Value.STRING, None),
        "tokenizer.ggml.pre": (pre, Value.STRING, None),
        "tokenizer.ggml.tokens": (texts, Value.ARRAY, Value.STRING),
        "tokenizer.ggml.token_type": (types, Value.ARRAY, Value.INT32),
        "tokenizer.ggml.merges": (merges, Value.ARRAY, Value.STRING),
        "tokenizer.ggml.add_bos_token": (_adds_bos(tokenizer), Value.BOOL, None),
    }
    for name in ("bos", "eos", "padding", "unknown"):
        short = {"padding": "pad", "unknown": "unk"}.get(name, name)
        number = getattr(tokenizer, f"{short}_token_id")
        if number is not None:
            entries[f"tokenizer.ggml.{name}_token_id"] = (number, Value.UINT32, None)
    if isinstance(tokenizer.chat_template, str):
        entries["tokenizer.chat_template"] = (tokenizer.chat_template, Value.STRING, None)
    return entries


def _name_of_rules(backend: Mapping[str, Any]) -> str:
    stated = backend.get("pre_tokenizer") or {}
    steps = stated.get("pretokenizers", [stated])
    kinds = {"Digits": "individual_digits", "ByteLevel": "use_regex"}
    rules = tuple(
        (
            step.get("type"),
            step["pattern"].get("Regex")
            if step.get("type") == "Split"
            else step.get(kinds.get(step.get("type"), "")),
        )
        for step in steps
    )
    known = [name for name, split in _SPLITS.items() if split == rules]
    if backend["model"]["type"] != "BPE" or not known:
        kind = f"{backend['model']['type']} with {', '.join(str(step) for step, _ in rules)}"
        raise UnsupportedModelError(
            f"The tokenizer ({kind}) has no counterpart in llama.cpp that is known here; known are "
            f"byte-level BPE with the rules {', '.join(_SPLITS)}. Export from the model's own GGUF "
            "file, whose tokenizer is copied."
        )
    return known[0]


def _tokens(tokenizer: Any, vocab_size: int) -> tuple[list[str], list[int]]:
    """Text and type of each token."""
    if len(tokenizer) > vocab_size:
        raise UnsupportedModelError(
            f"The tokenizer has {len(tokenizer):,} tokens and the model's embeddings "
            f"{vocab_size:,} rows, which llama.cpp does not load; add the rows "
            "(resize_token_embeddings), or remove the tokens."
        )
    texts = [f"[PAD{number}]" for number in range(vocab_size)]
    types = [_UNUSED] * vocab_size
    for text, number in tokenizer.get_vocab().items():
        texts[number], types[number] = text, _NORMAL
    for number, token in tokenizer.added_tokens_decoder.items():
        types[number] = _CONTROL if token.special else _USER_DEFINED
    return texts, types


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a").input_ids
    return bool(ids) and ids[0] == tokenizer.bos_token_id
