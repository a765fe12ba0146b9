"""A GGUF file of a few layers, written as llama.cpp writes them, and the model that it holds."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers as tf
from gguf import GGMLQuantizationType
from gguf.quants import quantize
from tokenizers import pre_tokenizers

from tests.tiny import randomise

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES = ("Ġ Ġ", "h e")
TEMPLATE = "{% for message in messages %}{{ message['content'] }}<|im_end|>{% endfor %}"
TOKENS = (
    *SPECIALS,
    *sorted(pre_tokenizers.ByteLevel.alphabet()),
    *(merge.replace(" ", "") for merge in MERGES),
)
HEADS, KV_HEADS = 4, 2


def tiny_source_model(
    seed: int = 0, *, tied: bool = True, hidden: int = 32, ffn: int = 48, layers: int = 2
) -> Any:
    """A random Llama with the vocabulary `TOKENS`."""
    config = tf.LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = tf.LlamaForCausalLM(config)
    randomise(model, seed)
    return model.eval()


def write_tiny_gguf(
    path: Path,
    *,
    architecture: str = "llama",
    seed: int = 0,
    kind: str = "F32",
    head: str | None = None,
    leave_out: str = "none",
    **sizes: Any,
) -> Any:
    """Write a GGUF file and return the model whose weights it holds.

    Args:
        path: The file to write.
        architecture: What its header says.
        seed: Seed of the weights.
        kind: Type of its matrices; if not F32, they hold the model's weights only approximately.
        head: Type of the head, which is then in the file even if the model ties it.
        leave_out: A tensor that the file lacks, or ``"tokenizer"``.
        **sizes: As for `tiny_source_model`.
    """
    model = tiny_source_model(seed, **sizes)
    tensors = {}
    for name, tensor in model.state_dict().items():
        own = head if name == "lm_head.weight" else None
        tied_head = name == "lm_head.weight" and model.config.tie_word_embeddings
        if (own or not tied_head) and name != leave_out:
            written, values = _gguf_tensor(name, tensor, model.config.num_hidden_layers)
            stored = GGMLQuantizationType[(own or kind) if values.ndim > 1 else "F32"]
            tensors[written] = quantize(values, stored), stored
    header = _header(model.config)
    if leave_out == "tokenizer":
        header = {name: value for name, value in header.items() if not name.startswith("token")}
    write_gguf(path, architecture, header, tensors)
    return model


def write_gguf(
    path: Path,
    architecture: str,
    entries: Mapping[str, Any],
    tensors: Mapping[str, tuple[np.ndarray, GGMLQuantizationType]],
) -> None:
    """Write a GGUF file.

    Args:
        path: The file to write.
        architecture: What its header says.
        entries: Values by the name of the writer's method for them, without its ``add_``.
        tensors: For each name the stored blocks and their type.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in entries.items():
        getattr(writer, f"add_{name}")(value)
    for name, (blocks, kind) in tensors.items():
        writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _header(config: Any) -> dict[str, Any]:
    return {
        "name": "Tiny",
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": HEADS,
        "head_count_kv": KV_HEADS,
        "rope_dimension_count": config.hidden_size // HEADS,
        "rope_freq_base": 10000.0,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "vocab_size": len(TOKENS),
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "smollm",
        "token_list": list(TOKENS),
        "token_types": [3] * len(SPECIALS) + [1] * (len(TOKENS) - len(SPECIALS)),
        "token_merges": list(MERGES),
        **{f"{name}_token_id": n for name, n in {"bos": 1, "eos": 2, "pad": 2, "unk": 0}.items()},
        "chat_template": TEMPLATE,
    }


def _gguf_tensor(name: str, tensor: torch.Tensor, layers: int) -> tuple[str, np.ndarray]:
    values = tensor.numpy()
    if "q_proj" in name or "k_proj" in name:
        heads = HEADS if "q_proj" in name else KV_HEADS
        # llama.cpp interleaves the two halves of each head that are rotated together
        halves = values.reshape(heads, 2, values.shape[0] // heads // 2, values.shape[1])
        values = halves.swapaxes(1, 2).reshape(values.shape)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, layers)
    return names.get_name(name, try_suffixes=(".weight",)), values
