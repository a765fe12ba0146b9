"""Run folders: names, settings, provenance, results and metrics of one run of a program."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from experiments.config import Config
from experiments.study.console import ExperimentError
from experiments.study.json_records import read_json, write_text
from rap_env.extras import package_versions

PACKAGES = (
    "rap-env", "torch", "transformers", "numpy", "gymnasium", "stable-baselines3", "sb3-contrib",
    "lm-eval", "hydra-core", "wandb", "matplotlib",
)  # fmt: skip

_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")

_REPOSITORY = Path(__file__).resolve().parents[2]

_LONGEST_NAME = 200  # file systems allow 255, of which agent and seed need some
_HASH_DIGITS = 8


def provenance() -> dict[str, Any]:
    """Return versions, machine and commit as plain values for a record."""
    return {
        "python": platform.python_version(),
        "packages": package_versions(PACKAGES),
        "machine": machine_facts(),
        "git": git_state(),
    }


@dataclass(frozen=True)
class RunFolder:
    """Folder of one run: ``config.yaml``, ``run.json`` and the files of its stage."""

    path: Path

    @property
    def metrics(self) -> Path:
        """Path of the metrics: one JSON line for each step."""
        return self.path / "metrics.jsonl"

    @property
    def results(self) -> Path:
        """Path of the result rows: one JSON line each."""
        return self.path / "results.jsonl"

    def start(
        self, config: Config, *, frozen: tuple[str, ...] = (), **facts: Any
    ) -> dict[str, Any]:
        """Write settings and provenance; called again when a run resumes.

        Args:
            config: All settings.
            frozen: Dotted names of sections that must not change when a run resumes.
            **facts: More entries of ``run.json``.

        Returns:
            The content of ``run.json``.

        Raises:
            ExperimentError: A frozen section differs from that of the first start.
            ArtifactError: ``run.json`` is damaged.
        """
        settings = asdict(config)
        self._check_unchanged(settings, frozen)
        write_text(self.path / "config.yaml", yaml.safe_dump(settings, sort_keys=False))
        record = self.read() or {"stage": config.stage, "starts": [], "seconds": 0.0}
        seeds = {"run": config.seed, "calibration": config.calibration.seed,
                 "report_text": config.evaluate.text.seed}  # fmt: skip
        record.update(facts, provenance={**provenance(), "seeds": seeds})
        record["starts"].append(datetime.now(UTC).isoformat(timespec="seconds"))
        write_text(self.path / "run.json", json.dumps(record, indent=1))
        return record

    def finish(self, started: float, **facts: Any) -> None:
        """Record in ``run.json`` that the run finished.

        Args:
            started: `time.monotonic()` at the start of this process.
            **facts: More entries of ``run.json``.
        """
        record = self.read() or {"seconds": 0.0}
        record["seconds"] = round(record.get("seconds", 0.0) + time.monotonic() - started, 2)
        record["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
        record.update(facts)
        write_text(self.path / "run.json", json.dumps(record, indent=1))

    def read(self) -> dict[str, Any] | None:
        """Return the content of ``run.json``; None if the run never started."""
        return read_json(self.path / "run.json", made_by="the program")

    def settings(self) -> dict[str, Any] | None:
        """Return the content of ``config.yaml``, or None."""
        path = self.path / "config.yaml"
        return yaml.safe_load(path.read_text()) if path.exists() else None

    def _check_unchanged(self, settings: dict[str, Any], frozen: tuple[str, ...]) -> None:
        before = self.settings()
        if before is None:
            return
        old, new = flatten(before), flatten(settings)
        changed = sorted(
            key for key in old.keys() | new.keys()
            if old.get(key) != new.get(key)
            and any(key == name or key.startswith(f"{name}.") for name in frozen)
            and key != "agent.total_timesteps"  # a longer training continues the run
        )  # fmt: skip
        if changed:
            shown = "; ".join(f"{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in changed[:4])
            raise ExperimentError(
                f"{self.path} holds a run with other settings ({shown}); choose another name=..., "
                "or delete the folder to start again."
            )


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts into one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def machine_facts() -> dict[str, Any]:
    """System and processor; with torch loaded, its number of threads and the GPUs."""
    facts = cpuinfo()
    flags = facts.get("flags", "").split()
    machine: dict[str, Any] = {
        "system": platform.system(),
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in flags],
    }
    if "torch" in sys.modules:  # recording provenance must not load torch
        torch = sys.modules["torch"]
        machine["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            gpus = map(torch.cuda.get_device_name, range(torch.cuda.device_count()))
            machine["gpu"] = ", ".join(gpus)
    return machine


def cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty on systems other than Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def git_state() -> dict[str, Any] | None:
    """Return the checkout's commit and whether it has local changes; None outside a repository.

    Records in ``results`` do not count: they change nothing that is measured.
    """

    def ask(*words: str) -> str:
        command = ["git", "-C", str(_REPOSITORY), *words]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        changes = ask("status", "--porcelain", "--", ".", ":!results")
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.SubprocessError):
        return None


def run_label(stage: str, agent: str, seed: int | str, overrides: str = "") -> str:
    """Return the name of a run folder: agent, settings that vary in the run's sweep, seed.

    >>> run_label("train", "dqn", 1, "agent=dqn,agent.hyperparameters.gamma=0.9,seed=1")
    'dqn-gamma=0.9-s1'
    >>> run_label("train", "rap", 0, "agent.policy_settings.without=[]")
    'rap-without=none-s0'

    A setting is named by the end of its key, with its whole value; settings for which a
    folder's name has no room are replaced by a hash of all.

    Args:
        stage: The program.
        agent: Name or label of the agent; only used for ``train``. Characters that do not
            suit a folder's name become ``_``.
        seed: Seed of the run; only used for ``train``.
        overrides: The settings, as in Hydra's ``override_dirname``.
    """
    named, own = [], ["name", "runs_dir", "stage"]  # what other parts of the path tell
    if stage == "train":
        own += ["seed", "agent.label"]
    for item in re.split(r",(?=[\w./@+~-]+=)", overrides) if overrides else []:
        key, _, value = item.partition("=")
        key = key.lstrip("+~")
        if key not in own and (key not in ("agent", "agent.name") or value != agent):
            named.append(f"{key.rpartition('.')[2]}={'none' if value == '[]' else value}")
    text = "-".join(map(_as_name, named)).strip("_")
    if len(text) > _LONGEST_NAME:
        digits = hashlib.sha256(text.encode()).hexdigest()[:_HASH_DIGITS]
        text = f"{text[: _LONGEST_NAME - _HASH_DIGITS]}-{digits}"
    if stage == "train":
        return "-".join(part for part in (_as_name(agent), text, f"s{seed}") if part)
    return text or stage


def _as_name(text: str) -> str:
    return re.sub(r"[^a-zA-Z0-9_.=+-]+", "_", text)
