"""A score table measured by Ray workers, against one process: ``python -m benchmarks.ray_workers``.

The masks are those that ``experiments.export_scores`` draws for a table, scored in calls of as many
masks. After each call in this process, the workers score the same masks; each process has one
thread. Every score must be the same number, bit for bit. Starting Ray and loading the model in the
workers happens once, before the measurement, and is recorded by itself.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from itertools import islice

from benchmarks.harness import Target, launch, ratios, seconds_of, spread
from benchmarks.record import write_record
from benchmarks.scoring_setup import ScoringSettings, open_setup
from experiments.training.score_tables import planned_masks
from rap_env.blocks import BlockMask
from rap_env.models.files.loading import load_llm
from rap_env.scoring.scorer import MaskScorer
from rap_env.scoring.workers import WorkerPool


@dataclass
class RayWorkersSettings(ScoringSettings):
    """Settings of this benchmark."""

    threads: int | None = 1
    windows: int = 1
    window_tokens: int = 24
    masks: int = 2000
    """Masks of the table."""
    masks_each: int = 256
    """Masks of one call."""
    workers: int = 2
    """Number of workers; as many cores must be idle."""


def main(settings: RayWorkersSettings) -> None:
    """Measure, check that the scores are equal, and write the record."""
    setup = open_setup(settings)
    blocks = setup.llm.num_blocks
    order = list(range(blocks))
    random.Random(0).shuffle(order)  # instead of a measured importance order
    masks = list(islice(planned_masks(blocks, [order], 0), settings.masks))
    dtype = str(setup.llm.dtype).removeprefix("torch.")
    loading = partial(
        load_llm, settings.model, device=setup.llm.device.type, dtype=dtype, weights="bf16"
    )
    workers = WorkerPool(loading, settings.workers)
    alone = MaskScorer(setup.llm, setup.corpus)
    shared = MaskScorer(setup.llm, setup.corpus, workers=workers)
    alone.nll_many(_first(blocks))
    start_s = seconds_of(lambda: shared.nll_many(_first(blocks)))
    alone_s, workers_s = [], []
    for first in range(0, len(masks), settings.masks_each):
        part = masks[first : first + settings.masks_each]
        alone_s.append(seconds_of(partial(alone.nll_many, part)))
        workers_s.append(seconds_of(partial(shared.nll_many, part)))
        print(f"{len(part)} masks: {alone_s[-1]:.1f} s, workers {workers_s[-1]:.1f} s", flush=True)
    if alone.nll_many(masks) != shared.nll_many(masks):
        raise SystemExit("Scores of workers differ from those of one process; nothing recorded.")
    ratio, slices = sum(alone_s) / sum(workers_s), ratios(alone_s, workers_s)
    write_record(
        "ray_workers",
        device=setup.device,
        settings=settings,
        targets=[
            Target(
                f"masks of a score table with {settings.workers} workers, times as fast",
                1.7, None, ratio, "one process with one thread", slices["low"], slices["high"],
            )
        ],
        measured={
            "masks": len(masks),
            "blocks_removed": spread([len(mask) for mask in masks]),
            "seconds": sum(workers_s),
            "one_process_s": sum(alone_s),
            "start_s": start_s,
            "block_forwards_times_one_process": shared.block_forwards / alone.block_forwards,
            "workers_lost": workers.losses,
        },
        notes=[
            "All scores were equal bit for bit.",
            f"The spread is that of calls with {settings.masks_each} masks.",
            "start_s: Ray starts, each worker imports torch and loads the model, once in a run.",
        ],
    )  # fmt: skip
    workers.close()


def _first(blocks: int) -> list[BlockMask]:
    """Some masks for the first call, which loads and widens weights."""
    return [BlockMask.of(index, (index + 1) % blocks, (index + 2) % blocks) for index in range(8)]


if __name__ == "__main__":
    launch(RayWorkersSettings, main)
