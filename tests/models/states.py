"""What a live model computes and holds, for tests."""

import hashlib
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from safetensors.torch import save_file

from rap_env.models.files.weight_files import PACKED_FILE
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.weights.tensors import named_weights, tensor_key, weights_of
from rap_env.plan import Plan
from tests.tiny import LAYERS, padded_batch, tiny_model, tiny_tokenizer


def logits(model: Any, **changes: Any) -> torch.Tensor:
    """Logits of a padded batch, of a live model or one of transformers."""
    module = model.model if isinstance(model, ElasticLLM) else model
    with torch.no_grad():
        actual: torch.Tensor = module(**{**padded_batch(), **changes}).logits
    return actual


def weights_hash(model: torch.nn.Module) -> str:
    """Hash of all weights and their names."""
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        total.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of the tensors in the model as it is now, tied ones once."""
    return sum(key[-1] for key in {tensor_key(tensor) for _, tensor in named_weights(model)})


def saved(
    folder: Path, name: str = "llama", dtype: torch.dtype = torch.bfloat16, **sizes: int
) -> Path:
    """A folder with a tiny model and its tokenizer, as transformers writes them."""
    tiny_model(name, dtype=dtype, **sizes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def saved_packed(
    folder: Path, name: str = "llama", level: str = "int8", dtype: torch.dtype = torch.bfloat16
) -> Path:
    """As `saved`, with blocks at a level, and embeddings with head at int8, as the own weights."""
    llm = opened(saved(folder, name, dtype), dtype)
    llm.apply(Plan.uniform(LAYERS, weights=level, embeddings="int8"))
    packed = {key: tensor.detach().contiguous() for key, tensor in weights_of(llm.model)}
    save_file(packed, folder / PACKED_FILE, {"format": "pt"})
    for path in folder.glob("model*.safetensors"):
        path.unlink()
    return folder


def opened(folder: Path, dtype: torch.dtype = torch.bfloat16) -> ElasticLLM:
    """The model of a folder, which it may read again."""
    model = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return ElasticLLM(model.requires_grad_(False), None, name="saved", folder=folder)


def apply_to(plan: Plan, *models: ElasticLLM) -> None:
    """Apply a plan to models that must then compute the same, bit for bit."""
    for model in models:
        model.apply(plan)
    first = logits(models[0])
    assert all(torch.equal(logits(model), first) for model in models[1:]), plan


def damage_file(file: Path, how: str) -> None:
    """Delete a file ("gone"), keep its first half ("cut") or change its last byte ("changed")."""
    content = file.read_bytes()
    if how == "gone":
        file.unlink()
    elif how == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
