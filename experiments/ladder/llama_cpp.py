"""``python -m experiments.ladder.llama_cpp``: llama.cpp's loss and bytes for the same file.

Each setting runs in its own process, so that resident memory is that of one setting. Windows are
given as token ids, so that no tokeniser stands between the two programs.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from experiments.config import Config
from experiments.contexts import build_context, held_out_scorer
from experiments.ladder.loss_against_bytes import LlamaCppRow, report_identity, table_by_shape
from experiments.launch import launch
from experiments.study.experiment_errors import ExperimentError
from experiments.study.harness import Job, Study
from experiments.study.json_records import Shape, delta_nll_fields, request_field
from experiments.study.run_folder import package_versions
from experiments.study.table_format import TitledTable
from rap_env.models.files.sources import gguf_source
from rap_env.plan import Plan
from rap_env.scoring.scorer import MaskScorer

PACKAGE = "llama-cpp-py-sync"
VERSION = "0.11739"
"""Version that the committed records were made with."""

CAPTION = (
    "llama.cpp on the same file and the same windows of token ids. MiB of weights and KV cache, "
    "and in brackets the resident memory of the process beyond what it had without a model."
)

_REPOSITORY = Path(__file__).resolve().parents[2]


def llama_cpp_jobs(config: Config, folder: Path) -> Iterator[Job[LlamaCppRow]]:
    """Yield every format of llama.cpp's cache for every request.

    Raises:
        ExperimentError: llama.cpp is not installed, or the model does not come from a GGUF file.
    """
    need_llama_cpp()
    settings, file = config.ladder, gguf_file(config.model.name)
    context = build_context(config)
    report = held_out_scorer(config.evaluate.text, "report", context)
    versions = package_versions([PACKAGE])
    identity = {"file": file.name, "llama_cpp": versions.get(PACKAGE)}
    depends_on = {**report_identity(report), **identity}
    for cache in settings.llama_cpp_caches:
        task = {"file": str(file), "cache": cache, "threads": 1}
        measured = LlamaCppCache(task, report)
        for shape in settings.shapes:
            yield Job(LlamaCppRow, (cache, shape), depends_on, partial(measured.row, shape))


class LlamaCppCache:
    """Measures llama.cpp with one format of the cache.

    Args:
        task: File, format of the cache, and threads, for `run_process`.
        report: Scorer of our model on the text that both are measured on.
    """

    def __init__(self, task: dict[str, Any], report: MaskScorer) -> None:
        self._task, self._report = task, report

    @cached_property
    def delta_nll(self) -> npt.NDArray[np.float64]:
        """NLL of llama.cpp minus that of our unquantised model, on each window, (windows,)."""
        windows = self._report.corpus.tokens
        task = {**self._task, "rows": 1, "tokens": windows.shape[1], "windows": windows.tolist()}
        return np.array(run_process(task)["nll"]) - self._report.window_nll(Plan())

    def row(self, shape: Shape) -> LlamaCppRow:
        """Measure one request."""
        measured = run_process({**self._task, "rows": shape[0], "tokens": shape[1]})
        return LlamaCppRow(
            cache=self._task["cache"],
            request=request_field(shape),
            held_bytes=measured["model_bytes"] + measured["buffers"]["KV"],
            resident_bytes=measured["resident_bytes"] - measured["before_bytes"],
            **delta_nll_fields(self.delta_nll),
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
            f"llama.cpp failed with {task['file']} and a cache in {task['cache']} for "
            f"{task['rows']} x {task['tokens']} tokens: {last}"
        )
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


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


def llama_cpp_tables(rows: list[LlamaCppRow]) -> list[TitledTable]:
    """ΔNLL of each format of the cache, and the bytes for each request."""
    by_cache = {(row.cache, row.shape): row for row in rows}
    labels = {cache: cache for cache, _ in by_cache}
    table = table_by_shape("llama.cpp's cache", labels, by_cache)
    return [TitledTable(table, "llama.cpp", CAPTION)] if rows else []


STUDY = Study(
    "llama_cpp",
    "The ladder",
    [LlamaCppRow],
    llama_cpp_jobs,
    llama_cpp_tables,
    frozen=("model", "evaluate.text"),
)


if __name__ == "__main__":
    launch(STUDY.name, STUDY.run)
