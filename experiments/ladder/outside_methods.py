"""Logits to compare methods by, and published ways to repair a model without training it.

ReplaceMe and LinearPatch leave out n consecutive layers and put one linear map in their place; a
correction of low rank is added to quantised weights. Shapes: N tokens, H hidden width, L layers.
"""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from experiments.study.experiment_errors import ExperimentError
from experiments.study.json_records import delta_nll_fields
from rap_env.blocks import block_name
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward
from rap_env.models.weights.gptq import DampedHessian, quantise_gptq
from rap_env.models.weights.packed_layout import PackedLevel
from rap_env.models.weights.quantisers import quantise
from rap_env.plan import Plan
from rap_env.scoring.native_agreement import TokenComparison, agreement_of
from rap_env.scoring.nll import HEAD_TOKENS, token_nll

# Of ReplaceMe's cosine objective: with 10 epochs at 1e-4 on ten thousand tokens,
# 1 - cosine fell by 16 % for four layers of the default model, with these by 46 %.
_EPOCHS, _BATCH_TOKENS, _LEARNING_RATE = 40, 1024, 1e-3


@torch.inference_mode()
def window_logits(llm: ElasticLLM, plan: Plan, window: torch.Tensor) -> torch.Tensor:
    """Logits of a window's positions but the last, in the model's dtype: (T,) to (T - 1, V)."""
    forward = PartialForward(llm, widen=True)
    with llm.masked(plan):
        hidden = forward.hidden(window[None].to(llm.device))[0, :-1]
        return torch.cat([forward.logits(part) for part in torch.split(hidden, HEAD_TOKENS)]).cpu()


class NativeLogits:
    """The unquantised model's logits on the held-out text, with which all others are compared.

    Args:
        llm: The model.
        windows: Token ids, (windows, T).

    Attributes:
        windows: The same.
        folder: A folder that is removed with this object.
    """

    def __init__(self, llm: ElasticLLM, windows: torch.Tensor) -> None:
        self._llm, self.windows = llm, windows
        self._folder = tempfile.TemporaryDirectory(prefix="rap-outside-")
        self.folder = Path(self._folder.name)
        self._logits = torch.empty(0)  # then in a file, (windows, T - 1, V)

    def read(self) -> None:
        """Run the model, which must be as it is, unless that was done."""
        if len(self._logits):
            return
        windows, tokens = self.windows.shape
        shape = windows, tokens - 1, self._llm.facts.vocab_size
        file, dtype = str(self.folder / "native.bin"), self._llm.dtype
        logits = torch.from_file(file, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        for number, window in enumerate(self.windows):
            logits[number] = window_logits(self._llm, Plan(), window)
        self._logits = logits

    def compare(self, logits: Iterable[torch.Tensor]) -> dict[str, Any]:
        """The fields of a row from a method's logits of each window, each (T - 1, V)."""
        delta_nll, tokens = [], []
        for window, native, own in zip(self.windows, self._logits, logits, strict=True):
            nll, native_nll = (token_nll(part, window[1:]).mean() for part in (own, native))
            delta_nll.append(float(nll - native_nll))
            comparison = TokenComparison(native, [Plan()])
            comparison.add(own)
            tokens.append(comparison.by_plan()[Plan()])
        agreement = agreement_of(np.concatenate(tokens, axis=1))
        return {**delta_nll_fields(delta_nll), **asdict(agreement)}


@dataclass(frozen=True)
class Cut:
    """Consecutive layers that are left out.

    Attributes:
        first: The first one; at least 1, because the layer before it is changed.
        layers: Their number.
    """

    first: int
    layers: int

    @property
    def plan(self) -> Plan:
        """The plan without these layers."""
        return Plan.removing(*range(2 * self.first, 2 * (self.first + self.layers)))


class DenseStates:
    """Residual states of the dense model on a calibration text.

    Args:
        llm: The model, unquantised.
        tokens: Token ids, (windows, T).
    """

    def __init__(self, llm: ElasticLLM, tokens: torch.Tensor) -> None:
        self._llm, self._tokens = llm, tokens

    @cached_property
    def of_blocks(self) -> list[torch.Tensor]:
        """The input of the first block, then what each block gives, (2L + 1) times (N, H)."""
        partial = PartialForward(self._llm)
        parts: list[list[torch.Tensor]] = [[] for _ in range(self._llm.num_blocks + 1)]
        with self._llm.masked(Plan()):
            for window in self._tokens:
                state = partial.enter(window[None].to(self._llm.device))
                parts[0].append(state[0])
                for block in range(self._llm.num_blocks):
                    state = partial.run((block,), state)
                    parts[block + 1].append(state[0])
        return [torch.cat(part) for part in parts]

    def before(self, layer: int) -> torch.Tensor:
        """The input of a layer, (N, H), float32; L for the output of the last one."""
        return self.of_blocks[2 * layer].float()

    def cut(self, layers: int) -> Cut:
        """The cut of `layers` layers across which states change their direction least.

        The mean over tokens of 1 - cosine, as both methods choose it.
        """

        def change(first: int) -> float:
            ends = self.before(first), self.before(first + layers)
            return 1 - float(functional.cosine_similarity(*ends).mean())

        return Cut(min(range(1, self._llm.facts.num_layers - layers + 1), key=change), layers)


Fit = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Fits ReplaceMe's map: see `least_squares`."""


def least_squares(mlp: torch.Tensor, rest: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """ReplaceMe's map T, (H, H), with the least squared error of ``mlp @ T + rest``.

    Args:
        mlp: What the last FFN before the cut adds to the residual stream, (N, H).
        rest: The residual stream without it, (N, H).
        target: The residual stream after the removed layers, (N, H).
    """
    inputs, outputs = mlp.double(), (target - rest).double()
    mapped: torch.Tensor = torch.linalg.lstsq(inputs.T @ inputs, inputs.T @ outputs).solution
    return mapped.float()


def least_angle(mlp: torch.Tensor, rest: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """As `least_squares`, with the least mean of 1 - cosine, by Adam from the identity."""
    mapped = torch.eye(mlp.shape[1], requires_grad=True)
    optimiser = torch.optim.Adam([mapped], lr=_LEARNING_RATE)
    generator = torch.Generator().manual_seed(0)
    for _ in range(_EPOCHS):
        for rows in torch.split(torch.randperm(len(mlp), generator=generator), _BATCH_TOKENS):
            cosine = functional.cosine_similarity(mlp[rows] @ mapped + rest[rows], target[rows])
            optimiser.zero_grad()
            torch.autograd.backward((1 - cosine).mean())
            optimiser.step()
    return mapped.detach()


REPLACE_ME: dict[str, Fit] = {"least squares": least_squares, "cosine": least_angle}
"""ReplaceMe's objectives (Shopkhoev et al. 2025, arXiv 2505.02819)."""


@contextlib.contextmanager
def replace_me(llm: ElasticLLM, states: DenseStates, cut: Cut, fit: Fit) -> Iterator[None]:
    """Merge ReplaceMe's map into the FFN before the cut, in a ``with`` block; it takes no bytes.

    The merged matrix is rounded to int4, as the matrices of a 4-bit file are.

    Raises:
        ExperimentError: That FFN does not end with one matrix without a bias.
    """
    block = 2 * cut.first - 1
    rest, after = states.of_blocks[block].float(), states.before(cut.first)
    weight = _last_matrix(llm, block)
    before = weight.detach().clone()
    mapped = fit(after - rest, rest, states.before(cut.first + cut.layers))
    merged = quantise(mapped.T @ before.float(), "int4").widened(weight.dtype)
    with torch.no_grad():
        weight.copy_(merged)
    try:
        yield
    finally:
        with torch.no_grad():
            weight.copy_(before)


def _last_matrix(llm: ElasticLLM, block: int) -> torch.Tensor:
    """The weights of an FFN's last linear layer, (H, inner width)."""
    modules = [llm.model.get_submodule(path) for path in llm.adapter.module_paths(block)]
    linear = [part for root in modules for part in root.modules() if isinstance(part, nn.Linear)]
    if not linear or linear[-1].bias is not None or len(linear) > 3:
        raise ExperimentError(
            f"ReplaceMe merges its map into the last matrix of an FFN, but {block_name(block)} of "
            f"{llm.name} does not end with one matrix without a bias; set "
            "ladder.removed_layers=[] to leave this method out."
        )
    weight: torch.Tensor = linear[-1].weight
    return weight


@contextlib.contextmanager
def linear_patch(llm: ElasticLLM, states: DenseStates, cut: Cut) -> Iterator[int]:
    """Multiply states at the cut by LinearPatch's matrix, in a ``with`` block.

    Chen et al. 2025, arXiv 2505.24680, eq. 9, without its distillation: ``P = H D H'`` with an
    orthonormal Hadamard matrix H. D has the ratio of each rotated channel's mean magnitude behind
    and before the removed layers.

    Yields:
        Bytes of the matrix.
    """
    before, behind = states.before(cut.first), states.before(cut.first + cut.layers)
    rotation = hadamard(before.shape[1]) / before.shape[1] ** 0.5
    scales = (behind @ rotation).abs().mean(dim=0) / (before @ rotation).abs().mean(dim=0)
    patch = (rotation * scales @ rotation.T).to(llm.dtype)

    def patched(_layer: nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        aligned: torch.Tensor = output @ patch
        return aligned

    hook = llm.adapter.layers(llm.model)[cut.first - 1].register_forward_hook(patched)
    try:
        yield patch.nbytes
    finally:
        hook.remove()


@contextlib.contextmanager
def low_rank_corrected(
    layers: Mapping[str, nn.Linear],
    sums: Mapping[str, torch.Tensor],
    level: PackedLevel,
    rank: int,
    damping: float,
) -> Iterator[int]:
    """Give dense layers the weights of a level plus a correction of low rank, in a ``with`` block.

    As in EoRA (Liu et al. 2024, arXiv 2410.21271): the product of two matrices of this rank that
    leaves the least squared error of the layer's outputs on the calibration text.

    Args:
        layers: The layers by name.
        sums: Sum of ``x.T x`` of the inputs of each, (in, in).
        level: The level, made by GPTQ.
        rank: Rank of each correction.
        damping: As for `DampedHessian.of`.

    Yields:
        Bytes of all corrections, in bfloat16.
    """
    before = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    added_bytes = 0
    with torch.no_grad():
        for name, layer in layers.items():
            weight, hessian = before[name].float(), DampedHessian.of(sums[name], damping)
            packed = quantise_gptq(weight, level, hessian).widened(torch.float32)
            root = torch.linalg.cholesky(hessian.matrix)
            u, s, v = torch.linalg.svd((weight - packed) @ root, full_matrices=False)
            right = torch.linalg.solve_triangular(root, v[:rank], upper=False, left=False)
            left, right = (part.bfloat16() for part in (u[:, :rank] * s[:rank], right))
            added_bytes += left.nbytes + right.nbytes
            layer.weight.copy_(packed + left.float() @ right.float())
    try:
        yield added_bytes
    finally:
        with torch.no_grad():
            for name, layer in layers.items():
                layer.weight.copy_(before[name])


def hadamard(size: int) -> torch.Tensor:
    """A Hadamard matrix, (size, size): entries of 1 and -1, orthogonal columns.

    Products of that of order 2 and Paley's of order 12 (squares modulo 11).

    Raises:
        ExperimentError: The size is not made of factors 2 and 12.
    """
    if size == 1:
        return torch.ones(1, 1)
    if size % 12 == 0:
        return torch.kron(_paley(11), hadamard(size // 12))
    if size % 2 == 0:
        return torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), hadamard(size // 2))
    raise ExperimentError(
        f"There is no Hadamard matrix here for a hidden width with the odd factor {size}; widths "
        "made of factors 2 and 12 have one."
    )


def _paley(prime: int) -> torch.Tensor:
    """Paley's first construction, of order prime + 1, for a prime that is 3 modulo 4."""
    squares = {number * number % prime for number in range(1, prime)}
    matrix = torch.ones(prime + 1, prime + 1)
    for row in range(prime):
        matrix[row + 1, 0] = -1
        for column in range(prime):
            is_square = (row - column) % prime in squares or row == column
            matrix[row + 1, column + 1] = 1 if is_square else -1
    return matrix
