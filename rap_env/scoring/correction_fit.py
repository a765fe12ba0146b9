"""Fits the correction network of a predictor, with torch."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from rap_env.scoring.predictor import SCALE, CorrectionNetwork

_HIDDEN = (256, 32)
_EPOCHS = 60
_BATCH_SIZE = 128
_LEARNING_RATE = 3e-3
_WEIGHT_DECAY = 1e-2
_QUADRATIC_BELOW = 0.05  # of the loss (Huber), in logarithms of delta_nll


def fit_correction(
    features: npt.NDArray[np.bool_], errors: npt.NDArray[np.float64], *, seed: int
) -> CorrectionNetwork:
    """The network that gives a predictor's errors on some masks; seconds for 20,000 masks.

    Args:
        features: The masks, (N, 2L), from `feature_matrix`.
        errors: log(delta_nll + offset), measured minus predicted, (N,).
        seed: Decides first weights and order of the masks.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = [features.shape[1], *_HIDDEN]
        layers = [nn.Linear(*pair) for pair in zip(sizes, [*_HIDDEN, 1], strict=True)]
        network = nn.Sequential(*(part for layer in layers for part in (layer, nn.ReLU())))[:-1]
        inputs, targets = torch.from_numpy(features).float(), torch.from_numpy(errors).float()
        _train(network, inputs, targets)
    scaled = [(layer.weight.T * SCALE, layer.bias * SCALE) for layer in layers]
    rounded = [tuple(values.round().int().tolist() for values in layer) for layer in scaled]
    weights, biases = zip(*rounded, strict=True)
    return CorrectionNetwork(weights, biases)


def _train(network: nn.Module, inputs: torch.Tensor, targets: torch.Tensor) -> None:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with one cycle of learning rates."""
    steps = _EPOCHS * -(-len(inputs) // _BATCH_SIZE)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=_WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps)
    for _ in range(_EPOCHS):
        for batch in torch.split(torch.randperm(len(inputs)), _BATCH_SIZE):
            loss = nn.functional.smooth_l1_loss(
                network(inputs[batch])[:, 0], targets[batch], beta=_QUADRATIC_BELOW
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
