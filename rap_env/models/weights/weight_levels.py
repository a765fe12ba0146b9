"""The levels of a live model's weights: a module for each level in each place.

The weights of an item (a block, or embeddings with head) are in a few modules that can be
packed and in parts that cannot: norms, biases, routers. At another level other modules stand
in the places of the former, as placeholders do in those of a removed block. The originals are
kept, so raising a level is exact.
"""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn

from rap_env.levels import WeightLevel
from rap_env.models.families.families import BlockSite, Slot
from rap_env.models.weights.low_bits import (
    LOW_BIT_FORMATS,
    matrix_from_tensors,
    packed_bytes,
    stored_level,
    tensor_shapes,
)
from rap_env.models.weights.packed_modules import (
    PackedModule,
    from_matrices,
    from_tensors,
    is_packable,
    matrices_of,
    module_widen_bytes,
    skeleton,
)
from rap_env.models.weights.packing import BLOCK, PACKED_LEVELS, PackedLevel, PackedMatrix
from rap_env.models.weights.quantisers import Quantiser, quantise
from rap_env.models.weights.tensors import StoredTensor, named_weights, tensor_key, verified_tensors
from rap_env.plan import EMBEDDINGS


class Place:
    """One module that can be packed, and where it is.

    Args:
        name: The module's name in the model.
        slot: Where it is.

    Attributes:
        original: The module with native weights.
        native: The module that computes at the native level: `original`, unless its weights
            are only read from files.
        shapes: Shapes of its matrices.
        widen_bytes: Bytes of the buffer into which its packed weights are widened.
        tied: The place whose weights it shares (a head tied to the embeddings).
    """

    def __init__(self, name: str, slot: Slot) -> None:
        self.name, self.slot = name, slot
        self.original = self.native = slot.original
        self.tied: Place | None = None
        self.skeleton = skeleton(slot.original)  # native weights may be evicted later
        weights = matrices_of(self.skeleton)
        self.shapes = [(w.shape[0], w.shape[1]) for w in weights.values()]
        self.widen_bytes = module_widen_bytes(self.skeleton)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The native tensors that packed ones replace, by name in the model."""
        own = (
            self.original.tensors()
            if isinstance(self.original, PackedModule)
            else {name: getattr(self.original, name) for name in matrices_of(self.skeleton)}
        )
        return {f"{self.name}.{name}": tensor for name, tensor in own.items()}

    def keeps(self, level: PackedLevel) -> bool:
        """Whether the module is the same at a level, because it is packed as tightly."""
        native, order = self.original, PACKED_LEVELS.index
        stored = {stored_level(level, shape) for shape in self.shapes}
        return isinstance(native, PackedModule) and order(native.level) >= max(map(order, stored))

    def quantised(
        self, level: PackedLevel, quantiser: Quantiser, added: torch.Tensor | None = None
    ) -> PackedModule:
        """The module at a level, made from native weights; the place is not tied.

        Args:
            level: The level.
            quantiser: Packs the weights.
            added: What is added to the weights of its only matrix first, (out, in).
        """
        if isinstance(self.original, PackedModule):
            matrices: dict[str, Any] = dict(self.original.matrices)
        elif self.native is not self.original:
            matrices = {"weight": self.native.weight}
        else:
            matrices = matrices_of(self.original)
        device = next(iter(self.weights.values())).device
        made = {
            name: quantise_by_rows(matrix, level, quantiser, device, added)
            for name, matrix in matrices.items()
        }
        return from_matrices(self.skeleton, made)

    def stored(self, level: PackedLevel, tensors: Mapping[str, torch.Tensor]) -> PackedModule:
        """As `quantised`, from tensors of a file, on any device, by their names in the model."""
        prefix = f"{self.name}."
        device = next(iter(self.weights.values())).device
        own = {
            name.removeprefix(prefix): tensor.to(device)
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        }
        return from_tensors(self.skeleton, level, own)


_VALUES_AT_ONCE = 2**20


def quantise_by_rows(
    weight: PackedMatrix | StoredTensor | torch.Tensor,
    level: PackedLevel,
    quantiser: Quantiser,
    device: torch.device | str = "cpu",
    added: torch.Tensor | None = None,
) -> PackedMatrix:
    """Quantise a matrix (out, in) of which some rows at a time are on a device in full width.

    `added`, (out, in), is added to it first.
    """
    rows, inputs = weight.shape
    size = max(BLOCK, _VALUES_AT_ONCE // inputs // BLOCK * BLOCK)
    if rows % BLOCK and level != "int8":
        size = rows  # parts of it would have another layout
    shapes, joined = tensor_shapes(level, (rows, inputs)), dict[str, torch.Tensor]()
    for first in range(0, rows, size):
        if isinstance(weight, PackedMatrix):
            wide = torch.empty(min(size, rows - first), inputs, device=device)
            weight.widen(wide, first)
        else:
            wide = weight[first : first + size].to(device)
        if added is not None:
            wide = wide + added[first : first + size]
        for name, part in quantiser(wide, level).tensors.items():
            if name not in joined:
                joined[name] = part.new_empty(shapes[name])
            of_groups = level != "int8" and name in ("scales", "zeros")
            all_rows = joined[name].transpose(0, 1) if of_groups else joined[name]
            own = part.transpose(0, 1) if of_groups else part
            begin = len(all_rows) * first // rows
            all_rows[begin : begin + len(own)] = own
    return matrix_from_tensors(level, (rows, inputs), joined)


class WeightItem:
    """The weights of a block, or of embeddings with head, at all their levels.

    Attributes:
        name: Name of its files: the block's index, or ``embeddings``.
        places: Where its packable modules are.
        native_bytes: Bytes of the native weights that other levels replace.
        levels: Bytes of the packed weights that replace them, by level. A level exists only
            if it takes fewer bytes than the one above it.
        level: The level of the modules in the places.
        files: Files with weights that a text made, by level; there may be none so far.
    """

    def __init__(self, name: str, places: Sequence[Place]) -> None:
        self.name = name
        self.places = tuple(places)
        untied = [place for place in places if place.tied is None]
        self.native_bytes = sum(t.nbytes for place in untied for t in place.weights.values())
        self.levels: dict[PackedLevel, int] = {}
        least = self.native_bytes
        for level in PACKED_LEVELS:
            kept = sum(t.nbytes for p in untied if p.keeps(level) for t in p.weights.values())
            replaced = [shape for p in untied if not p.keeps(level) for shape in p.shapes]
            size = kept + sum(packed_bytes(level, shape) for shape in replaced)
            if size < least:
                self.levels[level] = least = size
        self.level: WeightLevel = "native"
        self.files: dict[PackedLevel, Path] = {}
        self._made: dict[PackedLevel, dict[Place, PackedModule]] = {}

    @property
    def widen_bytes(self) -> int:
        """Bytes of the buffer into which any of its packed weights are widened."""
        return max((place.widen_bytes for place in self.places), default=0)

    @property
    def in_file(self) -> bool:
        """Whether native weights are only read from files, some rows at a time."""
        return any(place.native is not place.original for place in self.places)

    @property
    def made(self) -> tuple[PackedLevel, ...]:
        """The levels whose modules exist, with or without their weights."""
        return tuple(self._made)

    @property
    def made_bytes(self) -> int:
        """Bytes in memory of the packed weights that were made."""
        return sum(t.nbytes for level in self._made for t in self.tensors(level).values())

    def tensors(self, level: PackedLevel) -> dict[str, torch.Tensor]:
        """The tensors that were made for a level, by name in the model; tied ones once."""
        return {
            f"{place.name}.{name}": tensor
            for place, module in self._made[level].items()
            if place.tied is None
            for name, tensor in module.tensors().items()
        }

    @torch.inference_mode(False)
    @torch.no_grad()
    def quantise(
        self,
        level: PackedLevel,
        quantisers: Mapping[Place, Quantiser] = MappingProxyType({}),
        native: Place | None = None,
    ) -> None:
        """Make a level's modules from the native weights, which must be in memory.

        Args:
            level: The level.
            quantisers: For places whose weights are not packed with the least squared error.
            native: A place whose module stays the native one until `quantise_again`.
        """
        self._make(
            level, lambda place: place.quantised(level, quantisers.get(place, quantise)), native
        )

    @torch.inference_mode(False)
    @torch.no_grad()
    def quantise_again(
        self,
        level: PackedLevel,
        place: Place,
        quantiser: Quantiser,
        added: torch.Tensor | None = None,
    ) -> None:
        """Make the module of one place of a level that was made; see `Place.quantised`."""
        self._made[level][place] = place.quantised(level, quantiser, added)

    def lacks(self, level: WeightLevel) -> bool:
        """Whether it has a level that a text has to make first, as few bits of a block."""
        packed = packed_level(level)
        if packed is None or packed in self._made or packed not in self.levels:
            return False
        if packed in self.files:
            return not self.files[packed].is_file()
        return packed in LOW_BIT_FORMATS and self.name != EMBEDDINGS

    def make(self, level: PackedLevel) -> None:
        """Make a level's modules, from its file if a text made it."""
        if level in self.files:
            self.build(level, verified_tensors(self.files[level]))
        else:
            self.quantise(level)

    def build(self, level: PackedLevel, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make a level's modules from what `tensors` returned for it, here or elsewhere."""
        self._make(level, lambda place: place.stored(level, tensors))

    def _make(
        self,
        level: PackedLevel,
        module: Callable[[Place], PackedModule],
        native: Place | None = None,
    ) -> None:
        """Make the modules of places that differ at a level; tied ones share their matrices."""
        made: dict[Place, PackedModule] = {}
        for place in self.places:
            if place.tied is not None and place.tied in made:
                made[place] = from_matrices(place.skeleton, made[place.tied].matrices)
            elif place is not native and not place.keeps(level):
                made[place] = module(place)
        self._made[level] = made

    def forget(self, level: PackedLevel) -> None:
        """Drop a level's modules, which must not be in use."""
        del self._made[level]

    @contextlib.contextmanager
    def in_place(self, level: WeightLevel) -> Iterator[None]:
        """Put a level's modules into their places in a ``with`` block, whatever the plan is."""
        before = self.level
        self.put(level)
        try:
            yield
        finally:
            self.put(before)

    def put(self, level: WeightLevel) -> None:
        """Put the modules of a level, which were made, into their places."""
        packed = packed_level(level)
        made: Mapping[Place, nn.Module] = {} if packed is None else self._made[packed]
        for place in self.places:
            place.slot.put(made.get(place, place.native))
        self.level = level


def packed_level(level: WeightLevel) -> PackedLevel | None:
    """The level itself if other modules compute at it, else None."""
    return None if level in ("native", "removed") else cast("PackedLevel", level)


def block_items(model: nn.Module, sites: Iterable[BlockSite]) -> tuple[WeightItem, ...]:
    """The weights of each block, (2L,); no block may be removed from the model.

    Weights that are used elsewhere too are left out: packing them would free nothing.
    """
    names = {module: name for name, module in model.named_modules()}
    uses = Counter(tensor_key(tensor) for _, tensor in named_weights(model))
    items = []
    for site in sites:
        slots = [] if site.pruned else list(itertools.chain(*map(packable_slots, site.slots)))
        places = [Place(names[slot.original], slot) for slot in slots]
        alone = [p for p in places if all(uses[tensor_key(t)] == 1 for t in p.weights.values())]
        items.append(WeightItem(f"block{site.index:03d}", alone))
    return tuple(items)


def packable_slots(slot: Slot) -> Iterator[Slot]:
    """The slot of a module that is packed or can be, or such slots inside of the module."""
    if isinstance(slot.original, PackedModule) or is_packable(slot.original):
        yield slot
        return
    for name, child in slot.original.named_children():
        yield from packable_slots(Slot(slot.original, name, child))


def embeddings_item(model: Any) -> WeightItem:
    """The weights of embeddings and head."""
    rows, head = model.get_input_embeddings(), model.get_output_embeddings()
    uses = Counter(tensor_key(tensor) for _, tensor in named_weights(model))
    first = _place_of(model, rows)
    second = _place_of(model, head)
    ours, theirs = (list(map(tensor_key, place.weights.values())) for place in (first, second))
    tied = ours == theirs
    if tied:
        second.tied = first
    expected = 2 if tied else 1
    alone = all(uses[key] == expected for key in (*ours, *theirs))
    return WeightItem(EMBEDDINGS, [first, second] if alone else [])


def _place_of(model: nn.Module, module: nn.Module) -> Place:
    for path, parent in model.named_modules():
        for attribute, child in parent.named_children():
            if child is module:
                return Place(f"{path}.{attribute}".lstrip("."), Slot(parent, attribute, module))
    raise ValueError(f"{type(module).__name__} is no module of the model.")


def level_bytes(items: Sequence[WeightItem], own: Sequence[int], base: int) -> dict[str, Any]:
    """The entries of `ModelFacts` about packed weights, given the bytes of native ones."""
    *items, embeddings = items
    blocks = {
        level: tuple(
            native - item.native_bytes + item.levels[level] if level in item.levels else 0
            for item, native in zip(items, own, strict=True)
        )
        for level in PACKED_LEVELS
        if any(level in item.levels for item in items)
    }
    sizes = embeddings.levels.items()
    others = {level: base - embeddings.native_bytes + size for level, size in sizes}
    return {"level_param_bytes": blocks, "level_base_bytes": others}
