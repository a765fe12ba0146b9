"""Random parameters in the shapes of usual models, for trials of time and memory.

``python -m tests.models.random_models FOLDER`` writes half a billion in the shape of Qwen2 0.5B
into FOLDER: ``folder`` (bfloat16 safetensors), ``model.gguf`` (tied head, 400 MB) and
``untied.gguf`` (490 MB). With ``8b`` after FOLDER it writes ``8b.gguf`` (4.9 GB): eight billion,
in the shape of Llama 3.1 8B with the architecture of Qwen2. The GGUF files have the types of
llama.cpp's Q4_K_M. Their weights are random blocks, so they are not those of the folder.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers as tf
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from tokenizers import pre_tokenizers

from tests.models.tiny_gguf import write_gguf

Kind = GGMLQuantizationType
VOCABULARY = 151_936
_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_SIGMA = 0.02  # of the weights
_SCALE_AT = {Kind.Q4_K: 0, Kind.Q6_K: 208, Kind.Q5_0: 0, Kind.Q8_0: 0}
# Standard deviation of random codes, with the scales that K types have beside.
_CODES_SIGMA = {Kind.Q4_K: 4.6 * 32, Kind.Q6_K: 18.5 * 64, Kind.Q5_0: 9.2, Kind.Q8_0: 74}
_FALLBACKS = {Kind.Q4_K: Kind.Q5_0, Kind.Q6_K: Kind.Q8_0}  # of rows that do not fill blocks


HALF_BILLION = {
    "hidden_size": 896,
    "intermediate_size": 4_864,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
}
EIGHT_BILLION = {
    "hidden_size": 4_096,
    "intermediate_size": 14_336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}


def config(layers: int = 24, *, tied: bool = True, shape: Mapping[str, int] = HALF_BILLION) -> Any:
    """The config; fewer layers make a smaller model."""
    return tf.Qwen2Config(
        vocab_size=VOCABULARY,
        **shape,
        num_hidden_layers=layers,
        max_position_embeddings=32_768,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=tied,
        bos_token_id=VOCABULARY - 3,
        eos_token_id=VOCABULARY - 1,
    )


def write_gguf_model(path: Path, config: Any) -> None:
    """Write a GGUF file with the types of Q4_K_M."""
    layers, rng = config.num_hidden_layers, np.random.default_rng(0)
    with torch.device("meta"):
        shapes = {name: t.shape for name, t in tf.Qwen2ForCausalLM(config).state_dict().items()}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, layers)
    tensors = {}
    for name, shape in shapes.items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        written = names.get_name(name, try_suffixes=(".weight", ".bias"))
        tensors[written] = _tensor(name, tuple(shape), layers, config.tie_word_embeddings, rng)
    tokens, merges = _vocabulary()
    entries = {
        "name": path.stem,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": layers,
        "feed_forward_length": config.intermediate_size,
        "head_count": config.num_attention_heads,
        "head_count_kv": config.num_key_value_heads,
        "rope_freq_base": 1e6,
        "layer_norm_rms_eps": config.rms_norm_eps,
        "tokenizer_model": "gpt2",
        "tokenizer_pre": "qwen2",
        "token_list": tokens,
        "token_types": [1] * (VOCABULARY - 3) + [3] * 3,
        "token_merges": merges,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.bos_token_id,
        "chat_template": _TEMPLATE,
    }
    write_gguf(path, "qwen2", entries, tensors)


def write_folder(folder: Path, config: Any, gguf_file: Path) -> None:
    """Write a folder in bfloat16, with the tokenizer of a GGUF file."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    tf.Qwen2ForCausalLM(config).save_pretrained(folder)
    torch.set_default_dtype(torch.float32)
    tokenizer = tf.AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    tokenizer.save_pretrained(folder)


def _tensor(
    name: str, shape: tuple[int, ...], layers: int, tied: bool, rng: np.random.Generator
) -> tuple[np.ndarray, GGMLQuantizationType]:
    if len(shape) == 1:
        values = np.ones(shape) if "norm" in name else rng.normal(0, _SIGMA, shape)
        return values.astype(np.float32), Kind.F32
    kind = _kind(name, layers, tied)
    kind = _FALLBACKS[kind] if shape[1] % GGML_QUANT_SIZES[kind][0] else kind
    return _random_blocks(kind, shape, rng), kind


def _kind(name: str, layers: int, tied: bool) -> GGMLQuantizationType:
    """The type of llama.cpp's Q4_K_M: more bits for the head, and half of two matrices."""
    if name == "lm_head.weight" or (tied and name == "model.embed_tokens.weight"):
        return Kind.Q6_K
    if "v_proj" not in name and "down_proj" not in name:
        return Kind.Q4_K
    layer = int(name.split(".")[2])
    ends = layer < layers // 8 or layer >= 7 * layers // 8
    return Kind.Q6_K if ends or (layer - layers // 8) % 3 == 2 else Kind.Q4_K


def _random_blocks(
    kind: GGMLQuantizationType, shape: tuple[int, ...], rng: np.random.Generator
) -> np.ndarray:
    """Blocks (out, bytes of a row) with random codes and scales that fit `_SIGMA`."""
    elements, size = GGML_QUANT_SIZES[kind]
    blocks = rng.integers(0, 256, (shape[0] * shape[1] // elements, size), dtype=np.uint8)
    scales = _SIGMA / _CODES_SIGMA[kind] * rng.uniform(0.7, 1.3, len(blocks))
    place = _SCALE_AT[kind]
    blocks[:, place : place + 2] = scales.astype("<f2").view(np.uint8).reshape(-1, 2)
    if kind == Kind.Q4_K:  # all groups with scale and minimum 32, the middle of the codes
        blocks[:, 2:4] = (7.5 * scales).astype("<f2").view(np.uint8).reshape(-1, 2)
        blocks[:, 4:16] = [0xA0] * 8 + [0x00] * 4
    if kind == Kind.Q6_K:
        blocks[:, 192:208] = rng.integers(48, 80, (len(blocks), 16), dtype=np.uint8)
    return blocks.reshape(shape[0], -1)


def _vocabulary() -> tuple[list[str], list[str]]:
    """Tokens of bytes, of two letters, three and four, and the merges that make them."""
    letters = "etaoinsrhldcumfpgwybvkxjqz"
    starts = [*(f"Ġ {letter}" for letter in letters)]
    pairs = [f"{first} {second}" for first in letters for second in letters]
    merges = starts + pairs
    short = [merge.replace(" ", "") for merge in merges]
    merges += [f"{start} {letter}" for start in short for letter in letters]
    ends = [pair.replace(" ", "") for pair in pairs]
    merges += [f"{start} {end}" for start in short for end in ends]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # Two merges may make the same token; the first one counts.
    made = {merge.replace(" ", ""): merge for merge in reversed(merges)}
    ordered = [merge for merge in merges if made[merge.replace(" ", "")] == merge]
    ordered = ordered[: VOCABULARY - len(alphabet) - len(_SPECIALS)]
    tokens = [*alphabet, *(merge.replace(" ", "") for merge in ordered), *_SPECIALS]
    return tokens, ordered


if __name__ == "__main__":
    target = Path(sys.argv[1])
    if sys.argv[2:] == ["8b"]:
        write_gguf_model(target / "8b.gguf", config(32, tied=False, shape=EIGHT_BILLION))
        sys.exit()
    write_gguf_model(target / "model.gguf", config())
    write_folder(target / "folder", config(), target / "model.gguf")
    write_gguf_model(target / "untied.gguf", config(tied=False))
