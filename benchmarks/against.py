"""This checkout against another one, in turn: ``python -m benchmarks.against other=FOLDER``.

Each side is a process that imports `rap_env` from its own checkout; both measure the same work one
after the other, in CPU seconds of one thread. What has another name in the other checkout is given
as ``other_names.KEY=NAME``, with the keys of `NAMES`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import Settings, launch, ratios, spread
from benchmarks.record import Target, write_record

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "prune": "RAPPrune/SmolLM2-Table-v1",
    "ladder": "RAPLadder/SmolLM2-Table-v1",
    "plan": "rap_env.Plan.removing",
    "batch": "rap_env.models.live.live_batch.LiveBatch",
    "policy": "rap",
}
"""Names of this checkout: two pinned tasks, a plan of removed blocks, a live batch, a policy."""


@dataclass
class AgainstSettings(Settings):
    """Settings of this benchmark."""

    other: str = ""
    """Folder of the other checkout."""
    other_names: dict[str, str] = field(default_factory=dict)
    """Names of `NAMES` that are different there."""


class Side:
    """A process that imports `rap_env` from one checkout."""

    def __init__(self, checkout: Path, names: dict[str, str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, Path(__file__).with_name("against_process.py")], cwd=checkout,
            env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        self.works = self.ask(json.dumps(names))

    def ask(self, line: str) -> Any:
        """Send a line and read the answer."""
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the process."""
        self._process.kill()


def main(settings: AgainstSettings) -> None:
    """Measure, and write the record."""
    sides = {
        "new": Side(ROOT, NAMES),
        "old": Side(Path(settings.other), {**NAMES, **settings.other_names}),
    }
    seconds: dict[str, dict[str, list[float]]] = {}
    for name in sides["new"].works:
        seconds[name] = {side: [] for side in sides}
        for repeat in range(settings.repeats + 1):  # the first one warms up
            for side, process in sides.items():
                measured = process.ask(name)
                if repeat:
                    seconds[name][side].append(measured)
    for process in sides.values():
        process.close()
    write_record(
        "against",
        device="cpu",
        settings=settings,
        targets=[
            Target.of(
                f"{name}, times the CPU time of another checkout",
                ratios(each["new"], each["old"]),
                at_most=1.05,
                against=f"{spread(each['old'])['median']:.4f} s",
            )
            for name, each in seconds.items()
        ],
        measured={n: {side: spread(s) for side, s in each.items()} for n, each in seconds.items()},
    )


if __name__ == "__main__":
    launch(AgainstSettings, main)
