"""Calibration of a live model: levels that are made with a text.

Levels of four bits and less are made by GPTQ (`models.weights.gptq`) with a text, which loses
far less than rounding the weights alone. In a plan each block has a level of its own, so the
inputs of a block are those of the native model. The matrices of a block have the same level,
so its last one makes up for the errors of the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from rap_env.errors import ChecksumError
from rap_env.models.files.model_folder import locked
from rap_env.models.live.calibration_text import calibration_windows, packaged_windows
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward
from rap_env.models.weights.gptq import (
    DAMPING,
    DampedHessian,
    correction,
    hessians,
    quantise_gptq,
    recorded_inputs,
)
from rap_env.models.weights.packed_layout import LOW_BIT_FORMATS, PACKED_LEVELS, PackedLevel
from rap_env.models.weights.packed_modules import raw_weights
from rap_env.models.weights.packing import PackedMatrix
from rap_env.models.weights.tensors import verified_tensors, write_tensors
from rap_env.models.weights.weight_levels import Place, WeightItem
from rap_env.paths import cache_dir
from rap_env.plan import Plan

log = logging.getLogger(__name__)

_LEVELS: tuple[PackedLevel, ...] = tuple(level for level in PACKED_LEVELS if level != "int8")
_VERSION = 4
"""Part of the names of files: increase it when the weights come out differently."""

_OWN_TEXT_DAMPING = 0.1
"""Ten times the usual: with 0.01, FFN blocks at int3 made with text of the default model's
own lost 0.38 nats per token on WikiText, with 0.1 and 0.3 they lost 0.25."""

_CORRECTED: tuple[PackedLevel, ...] = ("int3", "int2")
"""Levels at which the last matrix of a block makes up for the others; at four bits they lose
hardly anything. At int3 all blocks of the default model lost 0.44 nats per token without it
on six windows of WikiText that no result is measured on, and 0.29 with it."""
_CORRECTION_DAMPING = 0.3
_EVERY = 2  # of the windows that it is fitted on
_WINDOWS = 8  # that a block runs at a time; a multiple of `_EVERY`


def use_packaged_text(llm: ElasticLLM) -> None:
    """Name the text of a model whose text is in the package.

    So its scores and facts have the hash of the text from the beginning.
    """
    if (windows := packaged_windows(llm)) is not None:
        use_text(llm, windows)


def calibrate_on_own_text(llm: ElasticLLM) -> None:
    """`calibrate` with `calibration_windows`."""
    calibrate(llm, calibration_windows(llm))


def use_text(
    llm: ElasticLLM,
    windows: torch.Tensor,
    levels: Collection[PackedLevel] = _LEVELS,
    *,
    uniform: bool = False,
) -> None:
    """Name the text that the levels of a model's blocks are made with, without making them.

    Call it before scoring: the hash of the text becomes part of the keys of scores.

    Args:
        llm: The model.
        windows: Token ids, (windows, tokens); ten thousand tokens are enough for good
            weights.
        levels: Packed levels below int8.
        uniform: As for `calibrate`.
    """
    text = hashlib.sha256(windows.cpu().contiguous().numpy().tobytes())
    text.update(f"{tuple(windows.shape)} {uniform} {_damping(uniform)} v{_VERSION}".encode())
    digest = text.hexdigest()
    folder = cache_dir() / "calibrated" / f"{llm.fingerprint[:16]}-{digest[:16]}"
    with llm.exclusive(), llm.applied(Plan()):
        items, residency = llm._live.all_items, llm.residency
        if any(level in item.made for item in items for level in levels):
            llm.set_residency("resident")
        for item in items:
            own = [level for level in levels if level in item.levels]
            if item is llm._live.embeddings:
                own = [level for level in own if level in LOW_BIT_FORMATS]
            item.files.update({n: folder / f"{item.name}.{n}.safetensors" for n in own})
            for level in set(own) & set(item.made):
                item.forget(level)
        llm.set_residency(residency)
        llm.calibration = digest
        llm.__dict__.pop("facts", None)


def calibrate(
    llm: ElasticLLM,
    windows: torch.Tensor,
    levels: Collection[PackedLevel] = _LEVELS,
    *,
    uniform: bool = False,
) -> None:
    """Make levels of all blocks and of the head with a text, as far as they have these levels.

    Each level of each block is a file in the cache folder, which later processes read; a
    process that was killed goes on where it was. For a model of 100 million parameters in its
    blocks it takes about a minute for the text and a minute for each level.

    Args:
        llm: As for `use_text`.
        windows: See there.
        levels: See there.
        uniform: All blocks will have the only level of `levels`: each is made for the inputs
            that the lowered blocks before it give, so that it makes up for their errors.

    Raises:
        StorageFullError: No space for the files.
    """
    use_text(llm, windows, levels, uniform=uniform)
    items = llm._live.all_items
    folders = {path.parent for item in items for path in item.files.values()}
    with llm.exclusive(), llm.applied(Plan()), contextlib.ExitStack() as locks:
        for folder in folders:
            locks.enter_context(locked(folder))
        if not any(map(_missing, items)):
            return
        made = dict.fromkeys(level for item in items for level in item.files)
        log.warning("Making weights of %s: %s (once; minutes)", llm.name, ", ".join(made))
        residency = llm.residency
        llm.set_residency("resident")
        _make(llm, windows, uniform)
        llm.set_residency(residency)


def _intact(path: Path) -> bool:
    try:
        verified_tensors(path)
    except (FileNotFoundError, ChecksumError):
        return False
    return True


def _make(llm: ElasticLLM, windows: torch.Tensor, uniform: bool) -> None:
    """Write the files of all blocks and of the head that are missing or damaged."""
    forward, damping = PartialForward(llm), _damping(uniform)
    states = [forward.enter(some.to(llm.device)) for some in torch.split(windows, _WINDOWS)]
    for number, step in enumerate(forward.steps):
        items = [llm._live.items[index] for index in step]
        missing = {item: _missing(item) for item in items}
        layers = {
            place.name: place.original
            for item, levels in missing.items()
            for place in item.places
            if levels and not raw_weights(place.original)
        }
        with hessians(layers) as sums, contextlib.ExitStack() as hooks:
            inputs = {
                item: hooks.enter_context(recorded_inputs(item.places[-1].original))
                for item, levels in missing.items()
                if levels
            }
            outputs = [forward.run(step, state) for state in states]
        damped = {id(total): DampedHessian.of(total, damping) for total in sums.values()}
        for index, (item, levels) in zip(step, missing.items(), strict=True):
            quantisers = {
                place: partial(quantise_gptq, hessian=damped[id(sums[place.name])])
                for place in item.places
                if place.name in sums
            }
            for level in levels:
                run = partial(forward.run, step, plan=Plan(weights=((index, level),)))
                _quantise(item, level, quantisers, inputs[item], states, run)
                _write(item, level)
        log.info("Levels of step %d of %d are made", number + 1, len(forward.steps))
        if uniform:
            own = [(index, level) for index in step for level in llm._live.items[index].files]
            outputs = [forward.run(step, state, Plan(weights=tuple(own))) for state in states]
            for item in items:
                for level in item.made:
                    item.forget(level)
        states = outputs
    if levels := _missing(llm._live.embeddings):
        hidden = [window.float() for state in states for window in forward.leave(state)]
        total = sum((part.T @ part for part in hidden[1:]), hidden[0].T @ hidden[0])
        head = llm._live.embeddings.places[-1]
        quantiser = partial(quantise_gptq, hessian=DampedHessian.of(total, damping))
        for level in levels:
            llm._live.embeddings.quantise(level, {head.tied or head: quantiser})
            _write(llm._live.embeddings, level)


def _quantise(
    item: WeightItem,
    level: PackedLevel,
    quantisers: Mapping[Place, Callable[..., PackedMatrix]],
    inputs: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    run: Callable[[torch.Tensor], object],
) -> None:
    """Make a level of a block; its last matrix makes up for the errors of those before it.

    Args:
        item: The block.
        level: The level.
        quantisers: By place.
        inputs: Native inputs of the last matrix, for each window.
        states: Inputs of the block's step, for some windows each.
        run: Runs the step with the block at the level.
    """
    last = item.places[-1]
    if level not in _CORRECTED or last not in quantisers or len(inputs) < sum(map(len, states)):
        # A last matrix of an expert does not see all windows.
        item.quantise(level, quantisers)
        return
    quantiser = quantisers[last]
    item.quantise(level, {place: own for place, own in quantisers.items() if place is not last})
    with recorded_inputs(item.module(level, last)) as changed:
        for state in states:
            run(state[::_EVERY])
    native = inputs[::_EVERY]
    if list(map(len, native)) == list(map(len, changed)):
        corrected_by = correction(native, changed, _CORRECTION_DAMPING)
        quantiser = partial(quantiser, corrected_by=corrected_by)
    item.quantise_again(level, last, quantiser)


def _damping(uniform: bool) -> float:
    return DAMPING if uniform else _OWN_TEXT_DAMPING


def _missing(item: WeightItem) -> list[PackedLevel]:
    return [level for level, path in item.files.items() if not _intact(path)]


def _write(item: WeightItem, level: PackedLevel) -> None:
    write_tensors(item.files[level], item.tensors(level))
    item.forget(level)
