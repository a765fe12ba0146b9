"""Records of ``experiments.ladder``: a plan's loss and bytes, and those of llama.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.study.records import Record

LADDER_FILE, LLAMA_CPP_FILE, SHIPPED_FILE = "ladder.jsonl", "llama_cpp.jsonl", "shipped.jsonl"
METHODS = ("uniform", "removal", "knapsack")


class RequestRecord(Record):
    """A record of something that serves one request; losses are over the unquantised model.

    The fields of every such record:

    Attributes:
        request: ``{"batch_size": int, "seq_len_tokens": int}``.
        held_bytes: Bytes of weights, stubs and KV cache.
        loss: Mean NLL minus that of the unquantised model, nats per token.
        loss_ci_low: Lower end of its 95 % interval over windows.
        loss_ci_high: Upper end.
        window_losses: The same for each window of the report text, (windows,).
    """

    request: dict[str, int]
    held_bytes: int
    loss: float

    rerun = "run experiments.ladder again"

    @property
    def shape(self) -> tuple[int, int]:
        """Batch size and sequence length in tokens."""
        return self.request["batch_size"], self.request["seq_len_tokens"]


@dataclass(frozen=True)
class LadderRow(RequestRecord):
    """One plan under one request: a line of ``ladder.jsonl``; see `RequestRecord`.

    Attributes:
        method: ``"uniform"``: one level for all weights and one for all caches; ``"removal"``:
            blocks are removed and nothing else; ``"knapsack"``: over the levels of all items.
        name: The setting, such as ``"int4 / int8"`` (weights / caches); of a policy its budget.
        budget_fraction: Budget as a fraction of the unquantised model's peak; None for a setting.
        budget_bytes: The budget itself; None for a setting.
        peak_bytes: Peak bytes of the plan, workspace included.
        fits: Whether the peak is within the budget; always true for a setting.
        breakdown: Bytes by what they hold, as `MemoryBreakdown.as_dict` gives them.
        levels: Levels of all items that are not native, as `CompressionPlan.of` takes them.
        packed: Whether native weights are those of the model's file, packed; else unquantised.
    """

    method: str
    name: str
    request: dict[str, int]
    budget_fraction: float | None
    budget_bytes: int | None
    held_bytes: int
    peak_bytes: int
    fits: bool
    breakdown: dict[str, int]
    levels: dict[str, str]
    loss: float
    loss_ci_low: float
    loss_ci_high: float
    window_losses: list[float]
    packed: bool = False

    record_name = "A record of the ladder"
    identity = ("method", "name", "shape")


@dataclass(frozen=True)
class LlamaCppRow(RequestRecord):
    """One format of llama.cpp's cache under one request: a line of ``llama_cpp.jsonl``.

    For the other fields see `RequestRecord`.

    Attributes:
        cache: Format of keys and values, such as ``"q8_0"``.
        model_bytes: Bytes of the model's tensors.
        cache_bytes: Bytes of the KV cache that llama.cpp allocates.
        compute_bytes: Bytes of its buffers for activations and logits.
        resident_bytes: Resident memory of a process whose cache is allocated and in which one
            sequence was run, beyond what the process had before it loaded the model.
    """

    cache: str
    request: dict[str, int]
    model_bytes: int
    cache_bytes: int
    held_bytes: int
    compute_bytes: int
    resident_bytes: int
    loss: float
    loss_ci_low: float
    loss_ci_high: float
    window_losses: list[float]

    record_name = "A record of llama.cpp"
    identity = ("cache", "shape")

    @property
    def name(self) -> str:
        """Name of the setting in tables and figures."""
        return f"llama.cpp {self.cache}"


@dataclass(frozen=True)
class ShippedRow(Record):
    """What one level costs one model: a line of ``shipped.jsonl``.

    Attributes:
        model: The model's name.
        shipped: How its weights were shipped, such as ``"Q4_1"`` or ``"bfloat16"``.
        what: What was lowered: ``"weights"`` (of all blocks), ``"embeddings"`` or ``"caches"``.
        level: To which level.
        rounding: How weights were quantised: ``"fitted"`` (least error, as the model does it),
            ``"nearest"``, or ``"calibrated"`` (GPTQ on the calibration text); empty for caches.
        saved: Share of the bytes of what was lowered that the level saves.
        text: Name of the report text.
        window_tokens: Tokens of its windows.
        loss: ΔNLL over the unquantised model, nats per token; interval and windows as in
            `RequestRecord`.
    """

    model: str
    shipped: str
    what: str
    level: str
    rounding: str
    saved: float
    text: str
    window_tokens: int
    loss: float
    loss_ci_low: float
    loss_ci_high: float
    window_losses: list[float]

    record_name = "A record of a model's levels"
    rerun = "run experiments.ladder.shipped again"
    identity = ("model", "what", "level", "rounding", "text")


def shapes_of(rows: Sequence[RequestRecord]) -> list[tuple[int, int]]:
    """Requests of some rows, in their order."""
    return list(dict.fromkeys(row.shape for row in rows))


def request_field(shape: tuple[int, int]) -> dict[str, int]:
    """A request as a field of a record."""
    return {"batch_size": shape[0], "seq_len_tokens": shape[1]}
