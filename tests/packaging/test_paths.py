"""How many files of the project each of three ways through the code enters, and that few do.

The ways are a limit of a server that a file lowers, from the file to the changed plan; a chat
request, from the request to its answer; a training on a score table. A file counts if one of its
functions is called on the way, in any thread; an import alone does not count.
``python -m tests.packaging.test_paths -v`` prints the files.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
MOST_LOWERED, MOST_ASKED, MOST_TRAINED = 29, 32, 75
"""Most files on each of the ways; the first one makes levels, as the first fall of a limit does."""
OURS = tuple(f"{ROOT / package}/" for package in ("rap_env", "agents", "experiments"))

_entered: set[str] | None = None


def _profile(frame: Any, event: str, _: Any) -> None:
    if _entered is not None and event == "call" and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        _entered.add(frame.f_code.co_filename)


@contextlib.contextmanager
def entered_files() -> Iterator[set[str]]:
    """The files of the project in which a function is called while the body runs.

    Threads count if they were started after ``threading.setprofile(_profile)``.
    """
    global _entered
    files: set[str] = set()
    _entered, names = set(), _entered
    sys.setprofile(_profile)
    try:
        yield files
    finally:
        sys.setprofile(None)
        entered, _entered = _entered, names
        files.update(str(Path(n).relative_to(ROOT)) for n in entered if n.startswith(OURS))


def serving_paths() -> tuple[set[str], set[str]]:
    """The files of a lower limit and of a chat request, on a server of a tiny model."""
    import httpx

    from rap_env.memory import MemoryModel
    from rap_env.plan import Plan
    from rap_env.runtime.memory_estimator import BatchShape
    from rap_env.runtime.memory_monitor import TensorMeter
    from rap_env.serving.settings import ServerSettings
    from rap_env.serving.stack import build_stack
    from tests.serving.background import BackgroundServer
    from tests.serving.conftest import chat, client_of
    from tests.serving.test_policies import knapsack_of
    from tests.serving.tokenizers import chat_tokenizer
    from tests.tiny import tiny_llm

    threading.setprofile(_profile)
    llm = tiny_llm(layers=3, tokenizer=chat_tokenizer())
    llm.set_residency("offload")
    with tempfile.TemporaryDirectory() as folder:
        limit = Path(folder) / "limit"
        settings = ServerSettings(
            model_name="tiny", model_memory="1GiB", max_delta_nll=None, memory_file=str(limit)
        )
        policy = knapsack_of(MemoryModel(llm))
        stack = build_stack(settings, llm=llm, policy=policy, meter=TensorMeter(llm))
        native = stack.engine.controller.estimator.peak_bytes(Plan(), BatchShape(1, 1))
        with BackgroundServer(stack.app) as server:
            chat(client_of(server))
            httpx.get(f"{server.url}/livez")  # imports the rest of the client
            with entered_files() as asked:
                chat(client_of(server))
            time.sleep(0.5)  # the last turn of the answer ends
            with entered_files() as lowered:
                limit.write_text(str(int(0.9 * native)))
                deadline = time.monotonic() + 30
                while not llm.plan and time.monotonic() < deadline:
                    time.sleep(0.001)
            assert llm.plan, "the plan has not changed"
    threading.setprofile(None)  # type: ignore[arg-type]
    return lowered, asked


def training_path() -> set[str]:
    """The files of a short training on a score table."""
    import runpy

    arguments = sys.argv
    with tempfile.TemporaryDirectory() as folder, entered_files() as files:
        settings = f"experiment=table runs_dir={folder} name=path store=null progress=false"
        sys.argv = ["train", *settings.split(), "threads=1", "agent.total_timesteps=600"]
        try:
            runpy.run_module("experiments.train", run_name="__main__", alter_sys=True)
        finally:
            sys.argv = arguments
    return files


def check(files: set[str], most: int) -> None:
    """The number of files stays low; an import or a call less is worth a lower limit."""
    assert len(files) <= most, f"{len(files)} files, at most {most}:\n" + "\n".join(sorted(files))


def test_a_lower_limit_and_a_chat_request_enter_few_files():
    pytest.importorskip("fastapi", reason="the extra serve is not installed")
    lowered, asked = serving_paths()
    check(lowered, MOST_LOWERED)
    check(asked, MOST_ASKED)


@pytest.mark.slow
def test_a_training_on_a_table_enters_few_files():
    check(training_path(), MOST_TRAINED)


if __name__ == "__main__":
    for files in (*serving_paths(), training_path()):
        print(f"{len(files)} files", *sorted(files) * ("-v" in sys.argv), sep="\n  ")
