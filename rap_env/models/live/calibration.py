"""Calibration of a live model: levels that are made with a text.

Levels of four bits and less are made with a text, which loses far less than rounding the
weights alone: *thorough* ones by GPTQ (`models.weights.gptq`), *quick* ones with the mean
square of each input as the importance of its weights (`models.weights.quantisers`). In a plan
each block has a level of its own, so the inputs of a block are those of the native model. The
matrices of a block have the same level, so its last one makes up for the errors of the others.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rap_env.artifacts import load_artifact, save_artifact
from rap_env.errors import ChecksumError
from rap_env.models.files.model_folder import locked, scratch
from rap_env.models.live.calibration_text import calibration_windows
from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.partial_forward import PartialForward
from rap_env.models.shared_tasks import Tasks
from rap_env.models.weights.gptq import DampedHessian, correction, hessians, quantise_gptq, recorded
from rap_env.models.weights.low_bits import LOW_BIT_FORMATS
from rap_env.models.weights.packed_modules import raw_weights
from rap_env.models.weights.packing import PACKED_LEVELS, PackedLevel
from rap_env.models.weights.quantisers import Quantiser, quantise
from rap_env.models.weights.tensors import verified_tensors, write_tensors
from rap_env.models.weights.weight_levels import Place, WeightItem
from rap_env.paths import LEVELS_FILE, any_prepared, calibrated_dir, prepared_dir
from rap_env.plan import Plan

log = logging.getLogger(__name__)

_LEVELS: tuple[PackedLevel, ...] = tuple(level for level in PACKED_LEVELS if level != "int8")
_VERSION = 1
"""Part of the names of files: increase it when the weights come out differently."""

QUICK = "quick-"
"""Beginning of the hash of a text that quick levels are made with."""

_PREPARED_KIND, _PREPARED_FORMAT = "prepared levels", 1

_DAMPING = 0.1
"""Ten times the usual of GPTQ: with 0.01, FFN blocks at int3 made with text of the default model's
own lost 0.38 nats per token on WikiText, with 0.1 and 0.3 they lost 0.25."""

_CORRECTED: tuple[PackedLevel, ...] = ("int3", "int2")
"""Levels at which the last matrix of a block makes up for the others; at four bits they lose
hardly anything. At int3 all blocks of the default model lost 0.44 nats per token without it
on six windows of WikiText that no result is measured on, and 0.29 with it."""
_CORRECTION_DAMPING = 0.3
_EVERY = 2  # of the windows that it is fitted on; with 4, int3 lost 0.03 nats per token more
_LEAST_IMPORTANCE = 1e-3  # of an input, in units of the mean: the text may never use it
_WINDOWS = 8  # that a block runs at a time


def use_prepared_levels(llm: ElasticLLM, *, quick: bool) -> None:
    """Name the text and the levels of a model that was prepared on this machine.

    Args:
        llm: The model.
        quick: Whether they may be quick ones.
    """
    if not any_prepared():
        return  # without the seconds that a fingerprint of unquantised weights takes
    with contextlib.suppress(FileNotFoundError):
        path = prepared_dir(llm.fingerprint) / LEVELS_FILE
        made = load_artifact(path, _PREPARED_KIND, _PREPARED_FORMAT)
        if quick or not made["calibration"].startswith(QUICK):
            _use_files(llm, made["calibration"], made["levels"])


def save_prepared_levels(llm: ElasticLLM, levels: Collection[PackedLevel]) -> None:
    """Let processes that load the model from now on use the levels that it has."""
    body = {"calibration": llm.calibration, "levels": list(levels)}
    path = prepared_dir(llm.fingerprint) / LEVELS_FILE
    save_artifact(path, _PREPARED_KIND, _PREPARED_FORMAT, body)


def calibrate_on_own_text(llm: ElasticLLM) -> None:
    """`calibrate` with `calibration_windows`."""
    calibrate(llm, calibration_windows(llm))


def use_text(
    llm: ElasticLLM,
    windows: torch.Tensor,
    levels: Collection[PackedLevel] = _LEVELS,
    *,
    quick: bool = False,
) -> None:
    """Name the text that the levels of a model's blocks are made with, without making them.

    Call it before scoring: the hash of the text becomes part of the keys of scores.

    Args:
        llm: The model.
        windows: Token ids, (windows, tokens); ten thousand tokens are enough for good
            weights.
        levels: Packed levels below int8.
        quick: Whether they are quick ones.
    """
    text = hashlib.sha256(windows.cpu().contiguous().numpy().tobytes())
    how = "quick" if quick else "thorough"
    text.update(f"{tuple(windows.shape)} {how} v{_VERSION}".encode())
    digest = text.hexdigest()
    _use_files(llm, f"{QUICK}{digest}" if quick else digest, levels)


def _use_files(llm: ElasticLLM, digest: str, levels: Collection[PackedLevel]) -> None:
    """Name the files of levels that a text with this hash makes or has made."""
    folder = calibrated_dir(llm.fingerprint, digest)
    with llm.exclusive():
        items = llm.weight_items
        if any(level in item.made for item in items for level in levels):
            _forget(llm, levels)
        for item in items:
            own = [level for level in levels if level in item.levels]
            if item is items[-1]:
                own = [level for level in own if level in LOW_BIT_FORMATS]
            item.files.update({n: folder / f"{item.name}.{n}.safetensors" for n in own})
        llm.calibration = digest
        llm.__dict__.pop("facts", None)


def _forget(llm: ElasticLLM, levels: Collection[PackedLevel]) -> None:
    """Drop levels that were made, wherever they are stored."""
    residency = llm.residency
    with llm.applied(Plan()):
        llm.set_residency("resident")
        for item in llm.weight_items:
            for level in set(levels) & set(item.made):
                item.forget(level)
        llm.set_residency(residency)


def calibrate(
    llm: ElasticLLM,
    windows: torch.Tensor,
    levels: Collection[PackedLevel] = _LEVELS,
) -> None:
    """Make levels of all blocks and of the head with a text, as far as they have these levels.

    Each level of each block is a file in the cache folder, which later processes read; a
    process that was killed goes on where it was. For a model of 100 million parameters in its
    blocks it takes about a minute for the text and a minute for each level.

    Args:
        llm: As for `use_text`.
        windows: See there.
        levels: See there.

    Raises:
        StorageFullError: No space for the files.
    """
    use_text(llm, windows, levels)
    items, folder = llm.weight_items, calibrated_dir(llm.fingerprint, llm.calibration)
    with llm.exclusive(), llm.applied(Plan()), contextlib.ExitStack() as locks:
        for other in {folder, *(path.parent for item in items for path in item.files.values())}:
            locks.enter_context(locked(other))
        if not any(map(_missing, items)):
            return
        made = list(dict.fromkeys(level for item in items for level in item.files))
        log.warning("Making weights of %s: %s (once; minutes)", llm.name, ", ".join(made))
        residency = llm.residency
        llm.set_residency("resident")
        with scratch(folder) as shared:
            make_levels(llm, windows, Tasks(shared), made)
        llm.set_residency(residency)


def make_levels(
    llm: ElasticLLM, windows: torch.Tensor, tasks: Tasks, levels: Sequence[PackedLevel]
) -> None:
    """Write those files of levels that are missing or damaged: of blocks, and of the head.

    There is a task for each layer and for each level of the head. A layer's task passes the
    native states on in a file before it rounds the layer's weights.

    Args:
        llm: The model, whose levels `use_text` has named.
        windows: As for `use_text`.
        tasks: The tasks of all processes that make the levels.
        levels: Levels of the head.
    """
    forward, count = PartialForward(llm), llm.num_blocks // 2

    def path_of(number: int) -> Path:
        return tasks.folder / f"states-{number:03d}.safetensors"

    def write(number: int, states: Sequence[torch.Tensor]) -> None:
        write_tensors(path_of(number), {f"{n:04d}": state for n, state in enumerate(states)})

    def make(number: int) -> dict[str, Any]:
        entered = path_of(min(number, count))
        tasks.wait(entered)
        stored = verified_tensors(entered)
        states = [stored[name].to(llm.device) for name in sorted(stored)]
        if number >= count:
            _make_head(llm, forward, states, levels[number - count])
            return {}
        layer, passes = forward.layer_steps[number], list[_NativePass]()
        with forward.loaded(layer):
            for step in layer:
                seen, states = _run_natively(llm, forward, step, states)
                passes.append(seen)
            write(number + 1, states)
            del states, seen
            while passes:  # each is freed once its blocks are done
                _round(llm, forward, passes.pop(0))
        path_of(number - 2).unlink(missing_ok=True)  # the one before may still be needed
        log.info("Levels of layer %d of %d are made", number + 1, count)
        return {}

    if not path_of(0).exists() and not any(tasks.folder.glob("states-*")):
        device = forward.model.device
        write(0, [forward.enter(some.to(device)) for some in torch.split(windows, _WINDOWS)])
    tasks.run("levels", count + len(levels), make)


def _quantiser(total: torch.Tensor, quick: bool) -> Quantiser:
    """A quantiser for inputs with this Hessian (in, in), or for quick levels its diagonal (in,)."""
    if quick:
        least = _LEAST_IMPORTANCE * total.mean() + torch.finfo(torch.float32).tiny
        return partial(quantise, importance=total + least)
    return partial(quantise_gptq, hessian=DampedHessian.of(total, _DAMPING))


def _make_head(
    llm: ElasticLLM, forward: PartialForward, states: list[torch.Tensor], level: PackedLevel
) -> None:
    """Write the file of a level of the head, unless it is intact; `states` left the last layer."""
    item, quick = llm.weight_items[-1], llm.calibration.startswith(QUICK)
    if level not in _missing(item):
        return
    hidden = [window.float() for state in states for window in forward.leave(state)]
    total = sum(part.square().sum(dim=0) if quick else part.T @ part for part in hidden)
    head = item.places[-1]
    item.quantise(level, {head.tied or head: _quantiser(total, quick)})
    _write(item, level)


_NativePass = tuple[
    tuple[int, ...], list[torch.Tensor], dict[str, torch.Tensor], dict[int, list[torch.Tensor]]
]
"""What the native blocks of a step saw: the blocks; their inputs; Hessians of the inputs of
matrices by name (`hessians`), for quick levels their diagonals; outputs of the last matrix of each
block, of every second window, for each entry of the inputs."""


def _run_natively(
    llm: ElasticLLM, forward: PartialForward, step: tuple[int, ...], states: list[torch.Tensor]
) -> tuple[_NativePass, list[torch.Tensor]]:
    """What the blocks of a step see and their outputs."""
    missing = {n: item for n in step if _missing(item := llm.weight_items[n])}
    layers = {
        place.name: place.original
        for item in missing.values()
        for place in item.places
        if not raw_weights(place.original)
    }
    quick = llm.calibration.startswith(QUICK)
    with hessians(layers, diagonal=quick) as sums, contextlib.ExitStack() as hooks:
        last_outputs = {
            n: hooks.enter_context(recorded(item.places[-1].original, _EVERY, outputs=True))
            for n, item in missing.items()
        }
        outputs = [forward.run(step, state) for state in states]
    return (step, states, sums, last_outputs), outputs


def _round(llm: ElasticLLM, forward: PartialForward, native: _NativePass) -> None:
    """Write the missing levels of the blocks of a step."""
    step, states, sums, last_outputs = native
    quick = llm.calibration.startswith(QUICK)
    distinct = {id(total): total for total in sums.values()}
    made = {key: _quantiser(total, quick) for key, total in distinct.items()}
    for index, outputs in last_outputs.items():
        item = llm.weight_items[index]
        own = [place for place in item.places if place.name in sums]
        quantisers = {place: made[id(sums[place.name])] for place in own}
        for level in _missing(item):
            _quantise(item, level, quantisers, outputs, states, partial(forward.run, step))
            _write(item, level)


def _quantise(
    item: WeightItem,
    level: PackedLevel,
    quantisers: Mapping[Place, Quantiser],
    outputs: Sequence[torch.Tensor],
    states: Sequence[torch.Tensor],
    run: Callable[[torch.Tensor], object],
) -> None:
    """Make a level of a block; its last matrix makes up for the errors of those before it.

    Args:
        item: The block.
        level: The level.
        quantisers: By place.
        outputs: Native outputs of the last matrix, for every second window of each of them.
        states: Inputs of the block's step, for some windows each.
        run: Runs the step with the modules that are in their places.
    """
    last = item.places[-1]
    if level not in _CORRECTED or last not in quantisers or len(outputs) < len(states):
        # A last matrix of an expert does not see all windows.
        item.quantise(level, quantisers)
        return
    item.quantise(level, quantisers, native=last)
    unequal = False

    def pairs() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        nonlocal unequal
        for state, native in zip(states, outputs, strict=True):
            inputs, results = recorded(last.original), recorded(last.original, outputs=True)
            with inputs as changed, results as changed_outputs, item.in_place(level):
                run(state[::_EVERY])
            for entered, left in zip(changed, changed_outputs, strict=True):
                unequal = unequal or len(native) != len(left)  # an expert sees other tokens
                if not unequal:
                    yield native.float() - left, entered

    added = correction(pairs(), _CORRECTION_DAMPING)
    item.quantise_again(level, last, quantisers[last], None if unequal else added)


def _missing(item: WeightItem) -> list[PackedLevel]:
    """The levels of an item whose files do not exist, or are damaged."""
    levels = []
    for level, path in item.files.items():
        try:
            verified_tensors(path)
        except (FileNotFoundError, ChecksumError):
            levels.append(level)
    return levels


def _write(item: WeightItem, level: PackedLevel) -> None:
    write_tensors(item.files[level], item.tensors(level))
    item.forget(level)
