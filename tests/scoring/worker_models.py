"""How the workers of a test load a tiny model: together, and with a node that can be held up."""

import os
import time
from pathlib import Path
from typing import Any

from rap_env.models.files.loading import load_llm
from rap_env.models.live.elastic import ElasticLLM


def open_together(folder: str, workers: int) -> ElasticLLM:
    """Load a model, and wait until as many workers have loaded it.

    The first run waits too, until all of them run, so that each has a batch in hand. Where there is
    a file ``hold-NODE``, it runs no further.
    """
    import ray

    root, node = Path(folder), ray.get_runtime_context().get_node_id()
    llm = load_llm(folder, device="cpu", dtype="float32")

    def note(*_: Any) -> None:
        (root / f"ran-{node}").touch()
        wait_while(lambda: len(list(root.glob("ran-*"))) < workers)
        wait_while((root / f"hold-{node}").exists)

    llm.model.model.norm.register_forward_pre_hook(note)
    (root / f"loaded-{os.getpid()}").touch()
    wait_while(lambda: len(list(root.glob("loaded-*"))) < workers)
    return llm


def wait_while(condition: Any, timeout_s: float = 60.0) -> None:
    began = time.monotonic()
    while condition() and time.monotonic() - began < timeout_s:
        time.sleep(0.01)
