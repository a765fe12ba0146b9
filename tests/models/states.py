"""What a live model computes and holds, for tests."""

import hashlib

import torch

from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.weights.tensors import named_weights, tensor_key
from tests.tiny import padded_batch


def logits(llm: ElasticLLM) -> torch.Tensor:
    """Logits of a padded batch."""
    with torch.no_grad():
        found: torch.Tensor = llm.model(**padded_batch()).logits
    return found


def weights_hash(model: torch.nn.Module) -> str:
    """Hash of all weights and their names."""
    total = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        total.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def tensor_bytes(model: torch.nn.Module) -> int:
    """Bytes of the tensors in the model as it is now, tied ones once."""
    return sum(key[-1] for key in {tensor_key(tensor) for _, tensor in named_weights(model)})
