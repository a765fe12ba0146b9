"""Models of the Hugging Face hub: taken from its cache, and downloaded only if missing there."""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rap_env.artifacts import disk_errors
from rap_env.errors import ModelNotAvailableError, UnsupportedModelError

log = logging.getLogger(__name__)

PROBE_S = 5.0
"""Seconds without an answer after which the hub counts as unreachable."""

OFFLINE_VARIABLE = "RAP_OFFLINE"
"""Environment variable that forbids every download; ``HF_HUB_OFFLINE`` forbids the hub
alone."""
_TRUE = {"1", "ON", "YES", "TRUE"}

_SAFETENSORS = re.compile(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?")
_PICKLES = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin(\.index\.json)?")
_SMALL = re.compile(r"[^/]+\.(json|model|txt|jinja|tiktoken)")
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
    from huggingface_hub.errors import GatedRepoError

    if variable := _offline_variable():
        raise ModelNotAvailableError(
            f"{repo_id} is not in the hub's cache and {variable} is set; unset it and try again "
            "with a network, or give the path of a model folder or GGUF file."
        )
    info = _ask(repo_id, revision)
    small, weights = _files_to_download(info, repo_id)
    sizes = [file.size for file in info.siblings if file.rfilename in {*small, *weights}]
    total = "size unknown" if None in sizes else f"{sum(sizes) / 1e6:,.0f} MB"
    log.warning(
        "Downloading %s from the Hugging Face hub, %s, into %s. Set %s=1 to forbid downloads.",
        repo_id,
        total,
        constants.HF_HUB_CACHE,
        OFFLINE_VARIABLE,
    )
    try:
        with disk_errors(repo_id):
            folder = Path(snapshot_download(repo_id, revision=revision, allow_patterns=small))
            check(folder)
            snapshot_download(repo_id, revision=revision, allow_patterns=weights)
    except GatedRepoError as error:
        raise ModelNotAvailableError(
            f"{repo_id} is a gated model of the hub; accept its licence on the model's page and "
            "set HF_TOKEN."
        ) from error
    except Exception as error:
        if isinstance(error, OSError) or _is_http(error):
            raise _unreachable(repo_id, error) from error
        raise
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


def _offline_variable() -> str | None:
    """The environment variable that forbids the use of the hub, if one does."""
    from huggingface_hub import constants

    if downloads_forbidden():
        return OFFLINE_VARIABLE
    now = os.environ.get("HF_HUB_OFFLINE", "").upper() in _TRUE
    return "HF_HUB_OFFLINE" if now or constants.HF_HUB_OFFLINE else None


def _ask(repo_id: str, revision: str | None) -> Any:
    """The hub's description of a model; waits at most `PROBE_S`, name resolution included."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    answers: queue.Queue[Any] = queue.Queue()

    def ask() -> None:
        options: dict[str, Any] = {"timeout": PROBE_S, "files_metadata": True}
        try:
            answers.put(HfApi().model_info(repo_id, revision=revision, **options))
        except Exception as error:
            answers.put(error)

    # The client's own timeout does not hold while a name is resolved.
    threading.Thread(target=ask, daemon=True).start()
    try:
        answer = answers.get(timeout=PROBE_S)
        if isinstance(answer, Exception):
            raise answer
        return answer
    except queue.Empty:
        raise _unreachable(repo_id, TimeoutError(f"no answer in {PROBE_S:g} s")) from None
    except RevisionNotFoundError as error:
        raise ModelNotAvailableError(
            f"{repo_id} has no revision {revision!r} on the hub."
        ) from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise ModelNotAvailableError(
            f"The hub has no model {repo_id!r} that you can read; check the spelling, and set "
            "HF_TOKEN if it is private."
        ) from error
    except Exception as error:  # of the client or of its HTTP library
        raise _unreachable(repo_id, error) from error


def _files_to_download(info: Any, repo_id: str) -> tuple[list[str], list[str]]:
    """Names of small files and of weight files to download; safetensors where there are any."""
    names = [sibling.rfilename for sibling in info.siblings or []]
    for pattern in (_SAFETENSORS, _PICKLES):
        weights = [name for name in names if pattern.fullmatch(name)]
        if weights:
            return [name for name in names if _SMALL.fullmatch(name)], weights
    raise UnsupportedModelError(
        f"{repo_id} has no weights in transformers' format; if it has a GGUF file, download that "
        "and give its path."
    )


def _is_http(error: Exception) -> bool:
    """Whether an error comes from the hub client's HTTP library, which depends on its version."""
    roots = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return bool(roots & {"httpx", "httpx2", "httpcore", "requests"})


def _unreachable(repo_id: str, error: Exception) -> ModelNotAvailableError:
    return ModelNotAvailableError(
        f"{repo_id} is not in the hub's cache and the hub cannot be reached ({error}); try again "
        "with a network, or give the path of a model folder or GGUF file."
    )
