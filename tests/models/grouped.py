"""Tiny models with enough positions for several groups of tokens, and plans for their caches."""

import torch
import transformers as tf

from rap_env.models.live.elastic import ElasticLLM
from rap_env.models.live.live_batch import LiveBatch
from rap_env.plan import Plan
from tests.tiny import LAYERS, VOCAB_SIZE, randomise, tiny_config

LEVELS = ("int8", "int4", "int2", "window64", "int4-window64")

POSITIONS = 256
LONG_WINDOW = 70
"""A sliding window of a model that ends within a group, in tokens."""


def long_llm(
    name: str = "llama", *, dtype: torch.dtype = torch.float32, window: int | None = LONG_WINDOW
) -> ElasticLLM:
    """A random model of 256 positions; families with a sliding window get this one."""
    config = tiny_config(name, positions=POSITIONS)
    for part in (config, config.get_text_config()):
        if getattr(part, "sliding_window", None) and window:
            part.sliding_window = window
    model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype)
    randomise(model)
    return ElasticLLM(model.eval(), None, name=f"long-{name}")


def uniform(level: str) -> Plan:
    """All caches at one level."""
    return Plan.uniform(LAYERS, caches=level)


def random_rows(*lengths: int, seed: int = 0) -> list[list[int]]:
    """Random tokens of some rows."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (n,), generator=generator).tolist() for n in lengths]


@torch.no_grad()
def teacher_forced(llm: ElasticLLM, rows: list[list[int]]) -> list[torch.Tensor]:
    """Logits of all tokens of each row, from one pass without a cache, (tokens, V) each."""
    passes = (llm.model(input_ids=torch.tensor([row]), use_cache=False) for row in rows)
    return [output.logits[0].float() for output in passes]


def last_logits(llm: ElasticLLM, rows: list[list[int]]) -> torch.Tensor:
    """Teacher-forced logits after the last token of each row, (B, V)."""
    return torch.stack([logits[-1] for logits in teacher_forced(llm, rows)])


def grown(batch: LiveBatch, rows: list[list[int]]) -> torch.Tensor:
    """Logits after more tokens of each row, one step at a time."""
    for column in zip(*rows, strict=True):
        logits = batch.extend(column)
    return logits


def rows_of(batch: LiveBatch) -> list[list[int]]:
    """The tokens of a batch."""
    return [list(row) for row in batch._rows]


def assert_near(
    actual: torch.Tensor, expected: torch.Tensor, *, native: torch.Tensor | None = None
) -> None:
    """Equal up to float32 rounding.

    Where `native` is given, the level's own effect (the distance to it) allows a tenth of itself:
    rounding noise of 1e-7 decides between two codes for a value in the middle between them, and
    one such value changes logits by up to that.
    """
    allowed = 1e-4 * float(expected.abs().max())
    if native is not None:
        allowed = max(allowed, 0.1 * float((native - expected).abs().max()))
    torch.testing.assert_close(actual, expected, rtol=0, atol=allowed)
