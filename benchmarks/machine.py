"""What a number was measured with: processor, threads, instruction sets, versions, commit."""

from __future__ import annotations

import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from experiments.comparison.run_folder import git_state

_PACKAGES = ("torch", "transformers", "gymnasium", "numpy", "rap-env")
_INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_bf16")


def machine() -> dict[str, Any]:
    """The machine, as plain values for a record."""
    facts = _cpuinfo()
    found: dict[str, Any] = {
        "system": platform.system(),
        "cpu": facts.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instruction_sets": [s for s in _INSTRUCTION_SETS if s in facts.get("flags", "").split()],
        "memory_bytes": _memory_bytes(),
    }
    if "torch" in sys.modules:  # describing the machine must not be what loads torch
        torch = sys.modules["torch"]
        found["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            found["gpu"] = torch.cuda.get_device_name()
    return found


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide how fast things are."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name.replace("-", "_")] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> dict[str, Any]:
    """Commit of the checkout and whether it has local changes (None where git cannot say)."""
    return git_state() or {"commit": None, "dirty": None}


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; empty elsewhere than on Linux."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.split("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
