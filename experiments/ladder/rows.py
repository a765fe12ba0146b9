"""Rows of the ladder programs: a plan's loss and bytes, those of llama.cpp, costs of levels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from experiments.study.records import LossRecord, Record, RequestRecord, Shape


@dataclass(frozen=True)
class LadderRow(RequestRecord, LossRecord):
    """One plan under one request; losses are over the unquantised model.

    Attributes:
        method: ``"uniform"``: one level for all weights and one for all caches; ``"removal"``:
            blocks are removed and nothing else; ``"knapsack"``: over the levels of all items.
        name: The setting, such as ``"int4 / int8"`` (weights / caches); of a policy its budget.
        budget_fraction: Budget as a fraction of the unquantised model's peak; None for a setting.
        budget_bytes: The budget itself; None for a setting.
        held_bytes: Bytes of weights, stubs and KV cache.
        peak_bytes: Peak bytes of the plan, workspace included.
        fits: Whether the peak is within the budget; always true for a setting.
        levels: Levels of all items that are not native, by name.
        packed: Whether native weights are those of the model's file, packed; else unquantised.
    """

    file = "ladder.jsonl"
    record_name = "A record of the ladder"
    rerun = "run experiments.ladder again"
    identity = ("method", "name", "shape")

    method: str
    name: str
    budget_fraction: float | None
    budget_bytes: int | None
    held_bytes: int
    peak_bytes: int
    fits: bool
    levels: dict[str, str]
    packed: bool


@dataclass(frozen=True)
class LlamaCppRow(RequestRecord, LossRecord):
    """One format of llama.cpp's cache under one request.

    Attributes:
        cache: Format of keys and values, such as ``"q8_0"``.
        held_bytes: Bytes of the model's tensors and of the KV cache that llama.cpp allocates.
        resident_bytes: Resident memory of a process whose cache is allocated and in which one
            sequence was run, beyond what the process had before it loaded the model.
    """

    file = "llama_cpp.jsonl"
    record_name = "A record of llama.cpp"
    rerun = "run experiments.ladder.llama_cpp again"
    identity = ("cache", "shape")

    cache: str
    held_bytes: int
    resident_bytes: int


@dataclass(frozen=True)
class ShippedRow(LossRecord):
    """What one level costs one model.

    Attributes:
        model: The model's name.
        shipped: How its weights were shipped, such as ``"Q4_1"`` or ``"bfloat16"``.
        what: What was lowered: ``"weights"`` (of all blocks), ``"FFN"``, ``"embeddings"`` or
            ``"caches"``.
        level: To which level.
        rounding: How weights were quantised: ``"fitted"`` (least error, as the model does it),
            ``"nearest"``, or ``"calibrated"`` (GPTQ on the calibration text); empty for caches.
        text: Name of the report text.
        lowered_bytes: Bytes of the weights that were lowered; 0 for caches.
    """

    file = "shipped.jsonl"
    record_name = "A record of a model's levels"
    rerun = "run experiments.ladder.shipped again"
    identity = ("model", "what", "level", "rounding", "text")

    model: str
    shipped: str
    what: str
    level: str
    rounding: str
    text: str
    lowered_bytes: int

    @property
    def source(self) -> tuple[str, str]:
        """Model, and how it was shipped."""
        return self.model, self.shipped

    @property
    def lowered(self) -> tuple[str, str, str]:
        """What was lowered, to which level, and how weights were rounded."""
        return self.what, self.level, self.rounding


@dataclass(frozen=True)
class OutsideRow(LossRecord):
    """What a method loses at its bytes of weights, over the unquantised model.

    Attributes:
        method: ``"uniform"`` and ``"knapsack"``, levels of this package; ``"llama.cpp"``;
            ``"ShortGPT"``, ``"LinearPatch"`` or ``"ReplaceMe, OBJECTIVE"``.
        name: The level, the knapsack's budget, the kind of file, or the number of removed layers.
        weight_bytes: Bytes of all weights, embeddings included.
        kl_divergence_mean: As in `rap_env.scoring.interface.NativeAgreement`, from the unquantised
            model.
        kl_divergence_p99: See there.
        same_top_token_share: See there.
        levels: Levels of all items that are not as shipped, by name.
        tensor_types: Number of tensors of each type in llama.cpp's file.
    """

    file = "outside.jsonl"
    record_name = "A record of other methods"
    rerun = "run experiments.ladder.outside again"
    identity = ("method", "name")

    method: str
    name: str
    weight_bytes: int
    kl_divergence_mean: float
    kl_divergence_p99: float
    same_top_token_share: float
    levels: dict[str, str]
    tensor_types: dict[str, int]


@dataclass(frozen=True)
class Ladder:
    """All rows of one comparison.

    Attributes:
        plans: Plans of the ladder.
        llama_cpp: Settings of llama.cpp.
        shipped: Costs of levels of several models.
        outside: Methods of others at their bytes of weights, and this package's levels.
    """

    plans: list[LadderRow]
    llama_cpp: list[LlamaCppRow]
    shipped: list[ShippedRow]
    outside: list[OutsideRow] = field(default_factory=list)

    @classmethod
    def of(cls, rows: Sequence[Record]) -> Ladder:
        """Sort rows by their type."""
        return cls(
            [row for row in rows if isinstance(row, LadderRow)],
            [row for row in rows if isinstance(row, LlamaCppRow)],
            [row for row in rows if isinstance(row, ShippedRow)],
            # A later row of the same name is of a newer plan.
            list({(r.method, r.name): r for r in rows if isinstance(r, OutsideRow)}.values()),
        )

    def __bool__(self) -> bool:
        return bool(self.plans or self.llama_cpp or self.shipped or self.outside)

    @cached_property
    def shapes(self) -> list[Shape]:
        """Requests of the plans."""
        return list(dict.fromkeys(row.shape for row in self.plans))

    def at(self, method: str, shape: Shape) -> list[LadderRow]:
        """Plans of one method and request, the largest first."""
        rows = [row for row in self.plans if (row.method, row.shape) == (method, shape)]
        return sorted(rows, key=lambda row: -row.held_bytes)

    @cached_property
    def settings(self) -> list[str]:
        """Names of the uniform settings, the largest first."""
        return [row.name for row in self.at("uniform", self.shapes[0])] if self.shapes else []

    def label(self, name: str) -> str:
        """Name of a uniform setting, with the dtype in the place of ``native``, such as bf16."""
        dtypes = {str(row.depends_on["dtype"]) for row in self.plans}
        native = dtypes.pop().replace("bfloat", "bf") if len(dtypes) == 1 else "native"
        return name.replace("native", native)

    @cached_property
    def fractions(self) -> list[float]:
        """Budgets of the policies, the largest first."""
        return sorted({row.budget_fraction for row in self.plans if row.budget_fraction})[::-1]

    def policy_row(self, method: str, shape: Shape, fraction: float) -> LadderRow | None:
        """The row of a policy at a budget, if there is one."""
        rows = [row for row in self.at(method, shape) if row.budget_fraction == fraction]
        return rows[0] if rows else None


def read_ladder(root: Path) -> Ladder:
    """Read the rows of all ladder programs under a comparison's folder; empty without any."""
    return Ladder.of([
        *LadderRow.read(root / "ladder" / LadderRow.file),
        *LlamaCppRow.read(root / "llama_cpp" / LlamaCppRow.file),
        *ShippedRow.read(root / "shipped" / ShippedRow.file),
        *OutsideRow.read(root / "outside" / OutsideRow.file),
    ])  # fmt: skip
