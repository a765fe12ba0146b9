"""Models of the Hugging Face hub: taken from its cache, and downloaded only if missing there."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rap_env.artifacts import disk_errors
from rap_env.errors import ModelNotAvailableError, RapError, UnsupportedModelError

log = logging.getLogger(__name__)

OFFLINE_VARIABLE = "RAP_OFFLINE"
"""Environment variable that forbids every download; ``HF_HUB_OFFLINE`` forbids the hub
alone."""
_TRUE = {"1", "ON", "YES", "TRUE"}

_SAFETENSORS, _PICKLES = "model*.safetensors", "pytorch_model*.bin"
_SMALL = ["*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken"]
_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")


def cached_hub_folder(repo_id: str, revision: str | None = None) -> Path | None:
    """The folder of a model in the hub's cache on this machine; None if it is not complete."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    # Not snapshot_download: it would miss files that are not needed (pictures, other
    # formats).
    try:
        config = try_to_load_from_cache(repo_id, "config.json", revision=revision)
    except HFValidationError:
        return None
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    return folder if has_all_weights(folder) else None


def hub_folder(repo_id: str, revision: str | None, check: Callable[[Path], object]) -> Path:
    """The folder of a hub model, downloaded if it is not in the hub's cache yet.

    A model that is in the cache is used as it is, without a look at the network, so that a
    run gives the same with and without one; name a revision to get another.

    Args:
        repo_id: ``organisation/name``.
        revision: Branch, tag or commit; None is the main branch.
        check: Called with the folder as soon as its config is there, before any weights are
            downloaded; raises if the model cannot be used.
    """
    folder = cached_hub_folder(repo_id, revision)
    if folder is not None:
        return folder
    from huggingface_hub import constants, snapshot_download

    if downloads_forbidden() or constants.HF_HUB_OFFLINE:
        raise ModelNotAvailableError(
            f"{repo_id} is not in the hub's cache and {OFFLINE_VARIABLE} or HF_HUB_OFFLINE is set; "
            "unset it and try again with a network, or give the path of a model folder or GGUF "
            "file."
        )
    log.warning(
        "Downloading %s from the Hugging Face hub into %s. Set %s=1 to forbid downloads.",
        repo_id,
        constants.HF_HUB_CACHE,
        OFFLINE_VARIABLE,
    )
    fetch = partial(snapshot_download, repo_id, revision=revision, ignore_patterns="*/*")
    try:
        with disk_errors(repo_id):
            folder = Path(fetch(allow_patterns=_SMALL))
            check(folder)
            for weights in (_SAFETENSORS, _PICKLES):
                if not has_all_weights(folder):
                    fetch(allow_patterns=weights)
    except RapError:
        raise
    except Exception as error:  # of the client or of its HTTP library
        raise ModelNotAvailableError(
            f"{repo_id} is not in the hub's cache and cannot be downloaded "
            f"({' '.join(str(error).split())}); check the name and the network, set HF_TOKEN for "
            "a private or gated model, or give the path of a model folder or GGUF file."
        ) from error
    if not has_all_weights(folder):
        raise UnsupportedModelError(
            f"{repo_id} has no weights in transformers' format; if it has a GGUF file, download "
            "that and give its path."
        )
    return folder


def has_all_weights(folder: Path) -> bool:
    """Whether a folder has a config and every weight file that its index names."""
    if not (folder / "config.json").is_file():
        return False
    for name in _INDEXES:
        if (folder / name).is_file():
            try:
                parts = json.loads((folder / name).read_text(encoding="utf-8"))["weight_map"]
            except (ValueError, KeyError):
                return False
            return all((folder / part).is_file() for part in set(parts.values()))
    return any((folder / name).is_file() for name in _SINGLES)


def downloads_forbidden() -> bool:
    """Whether the user forbade all downloads (``RAP_OFFLINE=1``)."""
    return os.environ.get(OFFLINE_VARIABLE, "").upper() in _TRUE
