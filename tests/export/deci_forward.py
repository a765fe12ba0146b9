"""Logits of a GGUF file of the architecture ``deci``, computed as llama.cpp computes them.

Written from what llama.cpp does, not from what the export intends: a layer whose FFN length is 0 is
skipped as a whole, and a layer with heads but without key and value heads has linear attention.
"""

from pathlib import Path

import numpy as np
import torch
from gguf.quants import dequantize
from torch.nn import functional

from rap_env.models.files.gguf_conversion import GgufFile


def deci_logits(path: Path, ids: torch.Tensor) -> torch.Tensor:
    """Logits (T, V) of token ids (T,), in float64."""
    file = GgufFile(path)
    assert file.value("general.architecture") == "deci"
    tensors = {
        t.name: torch.from_numpy(np.array(dequantize(t.data, t.tensor_type))).double()
        for t in file.tensors
    }
    read = set()

    def product(name: str, states: torch.Tensor) -> torch.Tensor:
        read.update(n for n in (f"{name}.weight", f"{name}.bias") if n in tensors)
        bias = tensors.get(f"{name}.bias")
        return functional.linear(states, tensors[f"{name}.weight"], bias)

    def norm(name: str, states: torch.Tensor) -> torch.Tensor:
        read.add(f"{name}.weight")
        epsilon = file.value("deci.attention.layer_norm_rms_epsilon")
        mean = states.square().mean(-1, keepdim=True)
        return states * torch.rsqrt(mean + epsilon) * tensors[f"{name}.weight"]

    count = file.value("deci.block_count")
    heads, kv_heads, lengths = (
        file.value(f"deci.{name}")
        for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
    )
    assert count == len(heads) == len(kv_heads) == len(lengths)
    assert heads[0] > 0, "llama.cpp reads the size of a head in the first layer"
    assert lengths[-1] > 0, "llama.cpp aborts"
    read.add("token_embd.weight")
    states = tensors["token_embd.weight"][ids]
    for layer in range(count):
        place = f"blk.{layer}"
        if not lengths[layer]:
            continue
        if kv_heads[layer]:
            normed = norm(f"{place}.attn_norm", states)
            q, k, v = (product(f"{place}.attn_{part}", normed) for part in "qkv")
            mixed = _attention(file, q, k, v, heads[layer], kv_heads[layer])
            states = states + product(f"{place}.attn_output", mixed)
        elif heads[layer]:
            normed = norm(f"{place}.attn_norm", states)
            states = states + product(f"{place}.attn_output", normed)
        normed = norm(f"{place}.ffn_norm", states)
        gate, up = (product(f"{place}.ffn_{part}", normed) for part in ("gate", "up"))
        assert gate.shape[1] == lengths[layer]
        states = states + product(f"{place}.ffn_down", functional.silu(gate) * up)
    head = "output" if "output.weight" in tensors else "token_embd"
    logits = product(head, norm("output_norm", states))
    assert read == tensors.keys(), "a tensor that no layer uses"
    return logits


def _attention(file, q, k, v, heads: int, kv_heads: int) -> torch.Tensor:
    """Causal attention with alternating pairs of channels rotated, (T, N D) to (T, N D)."""
    size = file.value("deci.attention.key_length")
    positions = torch.arange(len(q)).double()
    pairs = torch.arange(0, size, 2).double()
    frequencies = file.value("deci.rope.freq_base") ** (-pairs / size)
    angles = positions[:, None, None] * frequencies

    def rotated(x: torch.Tensor, count: int) -> torch.Tensor:
        even, odd = x.view(len(x), count, -1, 2).unbind(-1)
        turned = (
            even * angles.cos() - odd * angles.sin(),
            even * angles.sin() + odd * angles.cos(),
        )
        return torch.stack(turned, -1).reshape(len(x), count, size)

    query, key = rotated(q, heads), rotated(k, kv_heads)
    value = v.view(len(v), kv_heads, size)
    key, value = (part.repeat_interleave(heads // kv_heads, 1) for part in (key, value))
    mixed = functional.scaled_dot_product_attention(
        query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), is_causal=True
    )
    return mixed.transpose(0, 1).reshape(len(q), heads * size)
