"""Steps of pinned tasks on score tables, in CPU seconds: ``python -m benchmarks.table_steps``."""

from __future__ import annotations

from dataclasses import dataclass

import gymnasium as gym

from benchmarks.against import NAMES
from benchmarks.against_process import play
from benchmarks.harness import Settings, launch, spread
from benchmarks.record import Target, write_record


@dataclass
class TableSettings(Settings):
    """Settings of this benchmark."""

    num_envs: int = 64
    """Sub-environments of a vector environment."""
    steps: int = 400
    """Steps of it in one measurement."""


def main(settings: TableSettings) -> None:
    """Measure, and write the record."""
    per_s = {}
    for task in ("ladder", "prune"):
        env = gym.make_vec(NAMES[task], num_envs=settings.num_envs)
        steps = settings.steps * settings.num_envs
        per_s[task] = spread([steps / play(env, settings.steps) for _ in range(settings.repeats)])
    targets = [
        Target.of(
            f"steps of `{NAMES[task]}` per CPU second, {settings.num_envs} sub-environments",
            values,
            at_least=50_000.0,
        )
        for task, values in per_s.items()
    ]
    write_record(
        "table_steps", device="cpu", settings=settings, targets=targets,
        measured={"steps_per_cpu_s": per_s},
        notes=["Random valid actions, whose choice does not count."],
    )  # fmt: skip


if __name__ == "__main__":
    launch(TableSettings, main)
