"""GPTQ: a quantiser that keeps the outputs of a layer.

For inputs x of a linear layer, the squared error of its outputs under a change D of its
weights is ``trace(D H D.T)`` with the Hessian ``H = x.T x``. GPTQ (Frantar et al. 2023)
rounds one input after the other and lets the weights of later inputs compensate for each
error. Here each group of inputs gets its scale and zero when its turn comes, from the
compensated weights. Then groups are improved in turn: scale and zero by least squares under H,
and each code by coordinate descent (as in QuantEase, Behdin et al. 2023). A layer behind
quantised ones can make up for their errors (`correction`). Rows are quantised side by side,
transposed, so that what a step reads and writes is contiguous.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from rap_env.models.weights.low_bits import stored_level
from rap_env.models.weights.packing import PackedLevel, PackedMatrix
from rap_env.models.weights.quantisers import CodedRows, Grid, concatenated, nonzero, searched

_ROWS = 4096  # of a matrix that are quantised at a time, to bound temporary memory
_PANEL = 256  # rows of a symmetric matrix that are computed at a time, from the diagonal on


@contextlib.contextmanager
def hessians(
    layers: Mapping[str, nn.Module], *, diagonal: bool = False
) -> Iterator[dict[str, torch.Tensor]]:
    """Sum ``x.T x`` of the inputs of linear layers, (in, in), float32, while a model runs.

    Layers that are called with the same tensor one after the other, as the projections of
    queries, keys and values are, share one sum. Run the calibration text in the ``with``
    block.

    Args:
        layers: The layers by any names.
        diagonal: Whether only the diagonals, (in,), are summed.

    Yields:
        The sums, complete after the block, by the names of the layers that were called.
    """
    sums: dict[str, torch.Tensor] = {}
    last: tuple[torch.Tensor, str] | None = None

    def add(name: str, _layer: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        nonlocal last
        states = args[0]
        if last is not None and last[0] is states:
            sums[name] = sums[last[1]]
            return
        last, size = (states, name), states.shape[-1]
        if name not in sums:
            with torch.inference_mode(False):  # it is damped later, in place
                shape = (size,) if diagonal else (size, size)
                sums[name] = torch.zeros(shape, device=states.device)
        wide = states.detach().reshape(-1, size).float()
        if diagonal:
            sums[name] += wide.square().sum(dim=0)
        else:
            _add_upper(sums[name], wide)

    with contextlib.ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.callback(layer.register_forward_pre_hook(partial(add, name)).remove)
        yield sums
    if not diagonal:
        for total in {id(total): total for total in sums.values()}.values():
            _mirror_(total)


def _add_upper(total: torch.Tensor, states: torch.Tensor) -> None:
    """Add ``states.T @ states``, without most of what is below the diagonal; see `_mirror_`."""
    for first in range(0, len(total), _PANEL):
        panel = states[:, first : first + _PANEL]
        total[first : first + _PANEL, first:].addmm_(panel.T, states[:, first:])


def _mirror_(total: torch.Tensor) -> torch.Tensor:
    """Complete a symmetric matrix, in place, by what is above its diagonal."""
    for first in range(0, len(total), _PANEL):
        panel, rest = slice(first, first + _PANEL), slice(first + _PANEL, None)
        total[rest, panel] = total[panel, rest].T
    return total


@contextlib.contextmanager
def recorded(
    layer: nn.Module, every: int = 1, *, outputs: bool = False
) -> Iterator[list[torch.Tensor]]:
    """Keep inputs or outputs of a linear layer in a ``with`` block.

    Args:
        layer: The layer.
        every: Of the sequences of each call, the first one and every so many are kept.
        outputs: Whether outputs are kept.

    Yields:
        Of each call, (tokens, in) or (tokens, out), one sequence after the other.
    """
    kept: list[torch.Tensor] = []

    def keep(_layer: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        states = (output if outputs else args[0]).detach()
        sequences = states.reshape(-1, *states.shape[-2:])[::every]
        kept.append(sequences.flatten(0, 1).clone())

    hook = layer.register_forward_hook(keep)
    try:
        yield kept
    finally:
        hook.remove()


def correction(
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], damping: float
) -> torch.Tensor | None:
    """What to add to a layer's weights where the layers before it are quantised, (out, in).

    With it, outputs for the changed inputs y are nearest to the native ones, by least
    squares: for the outputs d that are lost, ``d.T y / H`` with ``H = y.T y`` (as in GPTAQ,
    Li et al. 2025, arXiv 2504.02692, with ``(x - y) W.T`` for d, which has fewer columns than
    native inputs x). With fewer tokens than inputs the same is ``d.T / (y y.T) y``.

    Args:
        pairs: For some tokens each, native outputs minus those of the native layer for the
            changed inputs, (tokens, out), and the changed inputs, (tokens, in).
        damping: As of `DampedHessian`: more of it changes the weights less.

    Returns:
        The correction; None without any pair.
    """
    pairs = list(pairs)
    if not pairs:
        return None
    outputs, inputs = (part.shape[1] for part in pairs[0])
    if sum(len(changed) for _, changed in pairs) < inputs:
        return _correction_by_tokens(pairs, damping)
    hessian = torch.zeros(inputs, inputs, device=pairs[0][1].device)
    cross = hessian.new_zeros(inputs, outputs)
    for lost, changed in pairs:
        wide = changed.float()
        _add_upper(hessian, wide)
        cross.addmm_(wide.T, lost.float())
    lower = _cholesky_(_damp_(_mirror_(hessian), damping))
    # torch.cholesky_solve would copy the factor.
    half = torch.linalg.solve_triangular(lower, cross, upper=False)
    added: torch.Tensor = torch.linalg.solve_triangular(lower, half.T, upper=False, left=False)
    return added


def _correction_by_tokens(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], damping: float
) -> torch.Tensor:
    """`correction` with a matrix of the tokens in place of one of the inputs."""
    lost, changed = (torch.cat(parts).float() for parts in zip(*pairs, strict=True))
    tokens, inputs = changed.shape
    # Damped by as much as the other form: both matrices have the same trace.
    products = _damp_(changed @ changed.T, damping * tokens / inputs)
    solved: torch.Tensor = torch.cholesky_solve(lost, _cholesky_(products))
    return solved.T @ changed


def _damp_(matrix: torch.Tensor, damping: float) -> torch.Tensor:
    diagonal = matrix.diagonal()
    diagonal += damping * diagonal.mean() + torch.finfo(torch.float32).tiny
    return matrix


def _cholesky_(matrix: torch.Tensor) -> torch.Tensor:
    """The lower factor of a symmetric matrix, on a CPU in its memory, which may be 100 MiB."""
    by_columns = matrix.mT  # the order that LAPACK works on
    in_place = {"out": by_columns} if matrix.device.type == "cpu" else {}
    lower: torch.Tensor = torch.linalg.cholesky(by_columns, **in_place)
    return lower


@dataclass(frozen=True)
class DampedHessian:
    """A Hessian that can be inverted.

    Attributes:
        matrix: (in, in).
        unit: Upper Cholesky factor of its inverse, each row divided by its pivot, (in, in).
        importance: 1 / pivot² of each input, (in,).
    """

    matrix: torch.Tensor
    unit: torch.Tensor
    importance: torch.Tensor

    @classmethod
    def of(cls, hessian: torch.Tensor, damping: float) -> DampedHessian:
        """Damp the sum of ``x.T x`` over calibration inputs, (in, in).

        Args:
            hessian: The sum, float32, which becomes the damped matrix.
            damping: Part of its mean diagonal that is added to its diagonal. More of it
                trusts the text less: it is better where text of another kind is served.
        """
        matrix = _damp_(hessian, damping)
        # Of the matrix with its inputs in reverse, the lower factor is an upper one of itself;
        # the inverse of that is the factor.
        upper = _cholesky_(matrix.flip(0, 1).double()).float().flip(0, 1)
        one = torch.eye(len(matrix), device=matrix.device)
        factor = torch.linalg.solve_triangular(upper, one, upper=True)
        pivots = factor.diagonal().clone()
        return cls(matrix, factor.div_(pivots[:, None]), pivots.square().reciprocal())


def quantise_gptq(
    weight: torch.Tensor,
    level: PackedLevel,
    hessian: DampedHessian,
) -> PackedMatrix:
    """Pack a matrix with a small squared error of its outputs.

    Args:
        weight: (out, in).
        level: A packed level below int8.
        hessian: Of the layer's inputs, on the same device.
    """
    weight = weight.detach()
    level = stored_level(level, (weight.shape[0], weight.shape[1]))
    parts = []
    for rows in torch.split(weight, _ROWS):
        columns = rows.float().T.contiguous()
        coded = _compensated(Grid.of(level, columns), columns, hessian)
        # Once: small layers gain from it; more often did not lower the loss of Gemma 3 270M.
        _improve_(coded, columns, hessian.matrix)
        # A quarter of the bytes.
        parts.append(replace(coded, codes=coded.codes.to(torch.int8)))
    return concatenated(parts)


def _in_turn(
    step: Callable[[slice, int], None],
    inputs: range,
    target: torch.Tensor,
    changes: torch.Tensor,
    matrix: torch.Tensor,
) -> None:
    """Run a step for one group of inputs after the other, each with what the ones before changed.

    Half of the inputs at a time, so that later ones take up changes in few large products.

    Args:
        step: Called with the inputs of a group and its index; it writes its part of `changes`.
        inputs: The first input of each group, and the end.
        target: (in, rows), from which ``matrix.T @ changes`` is taken for all earlier groups
            before a step.
        changes: (in, rows).
        matrix: (in, in), used above the diagonal.
    """
    if len(inputs) == 1:
        step(slice(inputs.start, inputs.stop), inputs.start // inputs.step)
        return
    first, last = inputs[: (len(inputs) + 1) // 2], inputs[(len(inputs) + 1) // 2 :]
    before, after = slice(first.start, last.start), slice(last.start, inputs.stop)
    _in_turn(step, first, target, changes, matrix)
    target[after].addmm_(matrix[before, after].T, changes[before], alpha=-1)
    _in_turn(step, last, target, changes, matrix)


def _compensated(grid: Grid, columns: torch.Tensor, hessian: DampedHessian) -> CodedRows:
    """GPTQ of rows, (in, rows)."""
    left = columns.clone()  # compensated for the errors so far
    codes, errors = torch.empty_like(columns), torch.empty_like(columns)
    scales, zeros = [], []

    def step(group: slice, _index: int) -> None:
        own, block = left[group], hessian.unit[group, group]
        (scale,), (zero,) = searched(grid, own[None], hessian.importance[group])
        inverse = nonzero(scale).reciprocal()
        rows = zip(own, codes[group], errors[group], strict=True)
        for column, (value, code, error) in enumerate(rows, 1):
            grid.nearest_(torch.sub(value, zero, out=code).mul_(inverse))
            torch.sub(value, torch.addcmul(zero, code, scale), out=error)
            own[column:].addr_(block[column - 1, column:], error, alpha=-1)
        scales.append(scale)
        zeros.append(zero)

    inputs = range(0, len(columns), grid.group_inputs)
    _in_turn(step, inputs, left, errors, hessian.unit)
    return CodedRows(grid, codes, torch.stack(scales), torch.stack(zeros))


def _improve_(coded: CodedRows, columns: torch.Tensor, hessian: torch.Tensor) -> None:
    """Scale and zero of one group after the other by least squares, then its codes, in place.

    Each code by coordinate descent.
    """
    grid, size = coded.grid, coded.grid.group_inputs
    values = torch.empty_like(columns)
    parts = (torch.split(part, size) for part in (coded.codes, values))
    for codes, own, scale, zero in zip(*parts, coded.scale, coded.zero, strict=True):
        torch.addcmul(zero, codes, scale, out=own)
    pull = hessian @ torch.sub(columns, values)
    changes = values  # the same memory

    def step(group: slice, index: int) -> None:
        own, near, change = hessian[group, group], pull[group], changes[group]
        codes, scale, zero = coded.codes[group], coded.scale[index], coded.zero[index]
        new_scale, new_zero = _fitted(grid, own, near, codes, scale, zero)
        torch.addcmul(new_zero - zero, codes, new_scale - scale, out=change)
        near.addmm_(own, change, alpha=-1)
        scale.copy_(new_scale)
        zero.copy_(new_zero)
        inverse = nonzero(scale).reciprocal()
        pivots = own.diagonal().reciprocal().tolist()
        for column, (before, pivot) in enumerate(zip(codes.clone(), pivots, strict=True)):
            code = torch.addcmul(before, near[column], inverse, value=pivot, out=codes[column])
            moved = torch.sub(grid.nearest_(code), before).mul_(scale)
            change[column] += moved
            near[column + 1 :].addr_(own[column, column + 1 :], moved, alpha=-1)

    _in_turn(step, range(0, len(columns), size), pull, changes, hessian)


def _fitted(
    grid: Grid,
    hessian: torch.Tensor,
    pull: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero of a group by least squares under the Hessian, (rows,).

    Args:
        grid: The grid of the rows.
        hessian: Of the group, (n, n).
        pull: The rows of the Hessian for the group's inputs times all errors, (n, rows).
        codes: (n, rows).
        scale: Scale so far, (rows,).
        zero: Zero so far, (rows,).
    """
    weighted = hessian @ codes
    both, alone = (weighted * codes).sum(dim=0), hessian.sum()
    cross = weighted.sum(dim=0)
    by_code, by_one = (pull * codes).sum(dim=0), pull.sum(dim=0)
    determinant = both * alone - cross.square()
    safe = determinant > 1e-6 * both * alone
    inverse = torch.where(safe, determinant, 1.0).reciprocal() * safe
    return grid.rounded(
        scale + (alone * by_code - cross * by_one) * inverse,
        zero + (both * by_one - cross * by_code) * inverse,
    )
