"""``python -m experiments.ladder.llama_cpp``: llama.cpp's loss and bytes for the same file.

Each setting runs in its own process, so that resident memory is that of one setting. Windows are
given as token ids, so that no tokeniser stands between the two programs.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.config import Config
from experiments.console import say
from experiments.contexts import build_context, held_out_scorer
from experiments.errors import ExperimentError
from experiments.ladder.program import FROZEN, report_identity
from experiments.ladder.records import LLAMA_CPP_FILE, LlamaCppRow, request_field
from experiments.ladder.summaries import LadderRecords
from experiments.ladder.tables import publish
from experiments.launch import launch
from experiments.study.records import RowFile, delta_nll_fields, row_key
from experiments.study.run_folder import RunFolder, git_state, package_versions
from rap_env.blocks import BlockMask
from rap_env.models.files.sources import gguf_source
from rap_env.models.progress import progress_bar
from rap_env.scoring.scorer import MaskScorer

PACKAGE = "llama-cpp-py-sync"
VERSION = "0.11739"
"""Version that the committed records were made with."""

_REPOSITORY = Path(__file__).resolve().parents[2]


def llama_cpp(config: Config, folder: Path) -> Path:
    """Measure every format of llama.cpp's cache; existing rows are not measured again.

    Returns:
        The path of ``llama_cpp.jsonl``.

    Raises:
        ExperimentError: llama.cpp is not installed, or the model does not come from a GGUF file.
    """
    need_llama_cpp()
    run, started = RunFolder(folder), time.monotonic()
    file = gguf_file(config.model.name)
    run.start(config, frozen=FROZEN, llama_cpp=package_versions([PACKAGE]).get(PACKAGE))
    context = build_context(config)
    report = held_out_scorer(config.ladder.text_of(config.evaluate.text), "report", context)
    depends_on = {
        **report_identity(report),
        "file": file.name,
        "llama_cpp": package_versions([PACKAGE]).get(PACKAGE),
    }
    provenance = {"depends_on": depends_on, "git": git_state()}
    rows_file = RowFile(folder / LLAMA_CPP_FILE, LlamaCppRow)
    caches, rows = config.ladder.llama_cpp_caches, []
    for cache in progress_bar(config.progress, caches, desc="llama.cpp", unit="format"):
        measured = LlamaCppCache(file, cache, report, config.ladder.llama_cpp_threads)
        for shape in config.ladder.shapes:
            key = row_key(cache, shape, provenance)
            rows.append(rows_file.get(key, partial(measured.row, shape, provenance)))
    run.finish(started, rows=len(rows))
    publish(folder, LadderRecords(llama_cpp=rows))
    say(f"{len(rows)} records in {folder / LLAMA_CPP_FILE}.")
    return folder / LLAMA_CPP_FILE


class LlamaCppCache:
    """Measures llama.cpp with one format of the cache.

    Args:
        file: The GGUF file.
        cache: The format, for keys and values.
        report: Scorer of our model on the text that both are measured on.
        threads: Threads of llama.cpp.
    """

    def __init__(self, file: Path, cache: str, report: MaskScorer, threads: int) -> None:
        self._report = report
        self._cache = cache
        self._task = {"file": str(file), "cache": cache, "threads": threads}

    @cached_property
    def delta_nll(self) -> npt.NDArray[np.float64]:
        """NLL of llama.cpp minus that of our unquantised model, on each window, (windows,)."""
        windows = self._report.corpus.tokens
        task = {**self._task, "rows": 1, "tokens": windows.shape[1], "windows": windows.tolist()}
        return np.array(run_process(task)["nll"]) - self._report.window_nll(BlockMask())

    def row(self, shape: tuple[int, int], provenance: dict[str, Any]) -> LlamaCppRow:
        """Measure one request."""
        held = run_process({**self._task, "rows": shape[0], "tokens": shape[1]})
        buffers = held["buffers"]
        return LlamaCppRow(
            cache=self._cache,
            request=request_field(shape),
            model_bytes=held["model_bytes"],
            cache_bytes=buffers["KV"],
            held_bytes=held["model_bytes"] + buffers["KV"],
            compute_bytes=buffers.get("compute", 0) + buffers.get("output", 0),
            resident_bytes=held["resident_bytes"] - held["before_bytes"],
            **delta_nll_fields(self.delta_nll),
            provenance=provenance,
        )


def run_process(task: dict[str, Any]) -> dict[str, Any]:
    """Run `experiments.ladder.llama_cpp_process` on a task.

    Raises:
        ExperimentError: It failed; the message ends with its error.
    """
    command = [sys.executable, "-m", "experiments.ladder.llama_cpp_process"]
    done = subprocess.run(
        command, input=json.dumps(task), capture_output=True, text=True, cwd=_REPOSITORY
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise ExperimentError(
            f"llama.cpp failed with a cache in {task['cache']} for {task['rows']} x "
            f"{task['tokens']} tokens: {last}"
        )
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def need_llama_cpp() -> None:
    """Check that llama.cpp's bindings are installed.

    Raises:
        ExperimentError: They are not.
    """
    if importlib.util.find_spec("llama_cpp_py_sync") is None:
        raise ExperimentError(
            f"experiments.ladder.llama_cpp needs the package {PACKAGE}; install it with "
            f"`pip install {PACKAGE}=={VERSION}`. It is no dependency of the project."
        )


def gguf_file(model: str) -> Path:
    """The GGUF file that a model comes from.

    Args:
        model: The path of a GGUF file, or the name of a model that was converted from one in the
            cache, such as ``smollm2-135m``.

    Raises:
        ExperimentError: It comes from no GGUF file, or the file is gone.
    """
    path = gguf_source(model)
    if path is None:
        raise ExperimentError(
            f"llama.cpp reads a GGUF file, and {model} comes from none that is on this machine; "
            "set model.name to a .gguf file, or to smollm2-135m@pypi."
        )
    return path


if __name__ == "__main__":
    launch("llama_cpp", llama_cpp)
