"""``python -m experiments.serve``: `rap serve` with its settings composed by Hydra.

Each change of the plan is a JSON line in the run folder's ``decisions.jsonl``.
"""

from __future__ import annotations

from pathlib import Path

from experiments.config import Config
from experiments.console import say
from experiments.contexts import server_settings
from experiments.launch import launch
from rap_env.serving.stack import serve as serve_until_interrupted


def serve(config: Config, folder: Path) -> None:
    """Serve until SIGINT or SIGTERM."""
    serve_until_interrupted(server_settings(config, folder), say)


if __name__ == "__main__":
    launch("serve", serve)
