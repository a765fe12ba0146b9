"""What ``rap info`` shows: versions, device, the cache folder, models and packaged score tables."""

from __future__ import annotations

import os
import platform
from typing import Any

from rap_env.errors import counted
from rap_env.extras import EXTRAS, missing_modules, package_versions
from rap_env.paths import cache_dir, folder_bytes
from rap_env.scoring.score_table import packaged_tables
from rap_env.version import __version__

_VERSIONS_OF = ("torch", "transformers", "gymnasium", "numpy", "safetensors", "huggingface-hub")
_NO_MODEL: dict[str, Any] = {"device": None, "device_kind": None, "threads": None, "models": []}
_MIB = 2**20


def describe() -> dict[str, Any]:
    """The installation as plain values."""
    folder = cache_dir()
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    sizes = {e.name: folder_bytes(e) if e.is_dir() else e.stat().st_size for e in entries}
    extras = {extra: not missing_modules(extra) for extra in EXTRAS}
    return {
        "rap_env": __version__,
        "python": platform.python_version(),
        "packages": package_versions(_VERSIONS_OF),
        "extras": extras,
        **(_device_and_models() if extras["model"] else _NO_MODEL),
        "cpus": os.cpu_count(),
        "cache": {"folder": str(folder), "bytes": sum(sizes.values()), "entries": sizes},
        "score_tables": [path.name for path in packaged_tables()],
    }


def _device_and_models() -> dict[str, Any]:
    """What only torch knows, and the models that are cached."""
    import torch

    from rap_env.models.device import choose_device, device_kind
    from rap_env.models.files.sources import cached_models

    device = choose_device()
    return {
        "device": str(device),
        "device_kind": device_kind(device),
        "threads": torch.get_num_threads(),
        "models": [
            {"name": model.name, "folder": str(model.folder), "bytes": model.size_bytes}
            for model in cached_models()
        ],
    }


def description(answer: dict[str, Any]) -> str:
    """The text of what `describe` returned."""
    versions = {"rap_env": answer["rap_env"], "python": answer["python"], **answer["packages"]}
    extras = (f"{n} ({'yes' if there else 'no'})" for n, there in answer["extras"].items())
    models, cache = answer["models"], answer["cache"]
    entries = [(n, size) for n, size in cache["entries"].items() if size >= 0.05 * _MIB]
    device = "Device: unknown without torch"
    if answer["device"] is not None:
        threads = counted(answer["threads"], "thread")
        device = f"Device: {answer['device']} ({answer['device_kind']}), {threads}"
    lines = [
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"Extras installed: {', '.join(extras)}",
        f"{device}, {answer['cpus']} CPUs",
        f"Cache: {cache['folder']}, {cache['bytes'] / _MIB:.1f} MiB",
        *(f"  {name:<40}{size / _MIB:>9.1f} MiB" for name, size in entries),
        *(f"Model: {m['name']}, {m['bytes'] / _MIB:.1f} MiB in {m['folder']}" for m in models),
    ]
    if not answer["extras"]["model"]:
        lines.append('To run a model: `pip install "rap-env[model]"`.')
    elif not models:
        lines.append("No model is cached; `rap fetch` downloads the default model.")
    lines += [f"Score table: {name}" for name in answer["score_tables"]]
    return "\n".join(lines)
