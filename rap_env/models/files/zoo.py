"""The zoo: tiny models whose rounded weights are in the package, one file each.

A file is a compressed safetensors file. It has the codes of each matrix, from -11 to 11, with a
scale for each row, all other weights in bfloat16, and the config. The first use writes the model
into the cache folder, in transformers' format; ``tools/tiny_models.py`` trains the models.
"""

from __future__ import annotations

import json
import lzma
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save, save_file

from rap_env.models.files.model_folder import file_sha256, made_once, models_dir

TINY = Path(__file__).parents[1] / "tiny"
"""Folder of the tiny models in the package, which ``tools/tiny_models.py`` trains."""

_LARGEST_CODE = 11
_SCALES = ".scales"
_CONFIG = "config"
_FILTERS = [{"id": lzma.FILTER_LZMA2, "lc": 0, "pb": 0}]
"""Codes do not depend on the bytes before them."""


def zoo_folder(name: str) -> Path:
    """The folder of a model of the zoo, in transformers' format, written at the first use.

    Raises:
        StorageFullError: There is no space for it.
    """
    path = _path(name)
    folder = models_dir() / f"{name}-{file_sha256(path)[:16]}"
    return made_once(folder, partial(_unpack, path), f"Unpacking {name}")


def _path(name: str) -> Path:
    return TINY / "zoo" / f"{name}.safetensors.xz"


def _unpack(path: Path, folder: Path) -> dict[str, Any]:
    """Write config, weights and tokenizer into an empty folder."""
    stored = load(lzma.decompress(path.read_bytes()))
    config = stored.pop(_CONFIG).numpy().tobytes()
    (folder / "config.json").write_bytes(config)
    weights = {}
    for name, tensor in stored.items():
        if not name.endswith(_SCALES):
            scales = stored.get(name + _SCALES)
            weights[name] = tensor if scales is None else tensor * scales[:, None]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for file in (TINY / "tiny-deep").glob("tokenizer*.json"):
        text = file.read_text(encoding="utf-8")
        if json.loads(config)["model_type"] == "qwen2":  # else it would split text otherwise
            text = text.replace("TokenizersBackend", "Qwen2Tokenizer")
        (folder / file.name).write_text(text, encoding="utf-8")
    return {"file": path.name}


def save_rounded(model: Any, name: str) -> None:
    """Write the file of a model of the zoo."""
    tensors = {}
    for weight_name, weight in model.state_dict().items():
        if weight.dim() == 2 and weight_name != "lm_head.weight":  # the head is tied
            scales = weight.abs().amax(dim=1) / _LARGEST_CODE
            tensors[weight_name + _SCALES] = scales.to(torch.bfloat16)
            codes = weight / tensors[weight_name + _SCALES].float()[:, None]
            tensors[weight_name] = codes.round().clamp(-_LARGEST_CODE, _LARGEST_CODE).to(torch.int8)
        elif weight.dim() == 1:
            tensors[weight_name] = weight.to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    config = model.config.to_json_string(use_diff=False).encode()
    tensors[_CONFIG] = torch.frombuffer(bytearray(config), dtype=torch.uint8)
    path = _path(name)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(lzma.compress(save(tensors), filters=_FILTERS))
