"""First load of a model in a new process, against transformers: ``python -m benchmarks.load``.

Each measurement starts a Python process that imports, loads from the cache, and exits when model
and tokenizer are ready. The files are in the page cache. Transformers is given the folder and the
dtype, so that it does not have to find them.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.harness import Settings, Target, alternate, launch, spread
from benchmarks.record import write_record

_ENDS = "import os; os._exit(0)"  # exit immediately: interpreter shutdown is not part of loading
_OURS = f"""
import sys, rap_env
rap_env.load_llm(sys.argv[1])
{_ENDS}
"""
_PEER = f"""
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, dtype, device = sys.argv[1:]
AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
AutoTokenizer.from_pretrained(folder)
{_ENDS}
"""


@dataclass
class LoadSettings(Settings):
    """Settings of this benchmark."""

    model: str = "smollm2-135m"


def main(settings: LoadSettings) -> None:
    """Measure, and write the record."""
    from rap_env.models.device import use_threads
    from rap_env.models.files.loading import load_llm
    from rap_env.models.files.sources import locate

    threads = use_threads(settings.threads or "auto")
    llm = load_llm(settings.model)  # downloads it, and fills the page cache
    folder, dtype = locate(settings.model).folder, str(llm.dtype).removeprefix("torch.")
    device = str(llm.device)
    cpu_seconds: dict[str, list[float]] = {"rap_env": [], "transformers": []}
    sides = {
        "rap_env": _process(_OURS, [settings.model], threads, cpu_seconds["rap_env"]),
        "transformers": _process(
            _PEER, [str(folder), dtype, device], threads, cpu_seconds["transformers"]
        ),
    }
    seconds = alternate(sides, settings.repeats)
    loaded = spread(seconds["rap_env"])
    write_record(
        "load",
        device=device,
        settings=settings,
        targets=[
            Target.of(
                "seconds until the model is ready",
                loaded,
                at_most=3.0,
                against=f"transformers alone: {spread(seconds['transformers'])['median']:.2f} s",
            )
        ],
        measured={
            side: {
                "wall_s": spread(seconds[side]),
                "cpu_s": spread(cpu_seconds[side][-settings.repeats :]),  # without the warm-up
            }
            for side in sides
        },
        notes=[f"{dtype}; a fresh process each time, from its start, files in the page cache."],
    )


def _process(
    code: str, arguments: list[str], threads: int, cpu_seconds: list[float]
) -> Callable[[], None]:
    """A call that runs `code` in a new Python process and records its processor seconds."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}

    def run() -> None:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-c", code, *arguments]
        subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)

    return run


if __name__ == "__main__":
    launch(LoadSettings, main)
