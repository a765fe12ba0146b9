"""The stubs that a name stands for: fitted once and kept, or a file of the user's."""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from pathlib import Path

from rap_env.artifacts import digest
from rap_env.errors import ArtifactError, UnknownNameError
from rap_env.llm.elastic import ElasticLLM
from rap_env.llm.model_folder import locked
from rap_env.paths import cache_dir
from rap_env.repair import REPAIRS
from rap_env.repair.fitting import FitConfig, fit_library
from rap_env.repair.library import StubLibrary
from rap_env.scoring.corpus import CorpusConfig, load_corpus

log = logging.getLogger(__name__)

TEXT = CorpusConfig(windows=64, window_tokens=128, role="calibration")
"""What the stubs of ``"library"`` are fitted on: text that the dense model writes."""

HELD_BACK = replace(TEXT, windows=16, role="selection")
"""What their ranks and penalties are chosen on."""

_FORMAT = 1  # raised when the same settings give other stubs


def open_library(name: str, llm: ElasticLLM, *, progress: bool = True) -> StubLibrary:
    """The stubs that a setting ``repair`` asks for.

    Args:
        name: ``"library"``: stubs fitted on self-written text at the first use (minutes on a CPU)
            and kept in the cache; or the path of a library's file.
        llm: The live model; its mask is restored.
        progress: Whether writing and fitting draw progress bars.

    Raises:
        UnknownNameError: It is neither that word nor a file.
        ArtifactError: The file is damaged or no stub library.
        CorpusError: The model has no start token to write text from.
        StorageFullError: The disk is full.
    """
    if name == "library":
        return _kept_library(llm, progress)
    path = Path(name).expanduser()
    if not path.is_file():
        hint = "The path of a library's file, made by `python -m experiments.repair`, will do too."
        raise UnknownNameError("repair", name, REPAIRS, hint)
    return StubLibrary.load(path)


def _kept_library(llm: ElasticLLM, progress: bool) -> StubLibrary:
    """The library out of the cache, which makes it if it is not there.

    It is always read from the file, so that all processes have the same stubs to the last bit:
    scores depend on them.
    """
    path = _path(llm)
    if not path.exists():  # else a cache that cannot be written to will do
        with locked(path):
            if not path.exists():
                _make(path, llm, progress)
    try:
        return StubLibrary.load(path)
    except ArtifactError:
        raise ArtifactError(
            f"The stubs of {llm.name} that are kept at {path} were cut or altered; delete that "
            "file to have them fitted again."
        ) from None


def _make(path: Path, llm: ElasticLLM, progress: bool) -> None:
    for left_over in path.parent.glob(f".{path.name}.*-*"):  # of a killed process
        left_over.unlink(missing_ok=True)
    log.info("Fitting stubs for %s; this takes minutes, once.", llm.name)
    text, held_back = (load_corpus(each, llm, progress=progress) for each in _texts(llm))
    fit_library(llm, text, held_back, FitConfig(), progress=progress).save(path)


def _path(llm: ElasticLLM) -> Path:
    """A file of its own for each model, text and way of fitting."""
    described = {
        "format": _FORMAT,
        "model": llm.fingerprint,
        "settings": asdict(FitConfig()),
        "texts": [asdict(each) for each in _texts(llm)],
    }
    return cache_dir() / "repair" / f"{digest(described)[:24]}.safetensors"


def _texts(llm: ElasticLLM) -> tuple[CorpusConfig, CorpusConfig]:
    """What to fit on and what to choose on, in windows that the model can read."""
    length = min(TEXT.window_tokens, llm.adapter.max_positions)
    return replace(TEXT, window_tokens=length), replace(HELD_BACK, window_tokens=length)
