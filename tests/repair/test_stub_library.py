"""A stub library round-trips bit for bit; damaged files are rejected."""

import errno
import os

import pytest
import safetensors.torch
import torch

from rap_env.artifacts import save_artifact
from rap_env.errors import ArtifactError, StorageFullError
from rap_env.plan import Plan
from rap_env.repair.stub_library import StubLibrary
from tests.models.live.test_elastic import MASKS
from tests.models.states import logits, weights_hash
from tests.models.stubs import RANKS, random_stubs
from tests.tiny import FAMILIES, tiny_llm

EVERY_DTYPE = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def library(dtype=torch.float32, name="llama", **origin) -> StubLibrary:
    llm = tiny_llm(name, dtype=dtype)
    return StubLibrary(llm.name, llm.fingerprint, random_stubs(llm), origin)


@pytest.fixture
def path(tmp_path):
    library(text="some").save(tmp_path / "stubs.safetensors")
    return tmp_path / "stubs.safetensors"


@EVERY_DTYPE
def test_a_library_round_trips_bit_for_bit(dtype, tmp_path) -> None:
    made = library(dtype, method="random", numbers=[0.1, None, {"deep": True}])
    made.save(tmp_path / "new" / "stubs.safetensors")
    loaded = StubLibrary.load(tmp_path / "new" / "stubs.safetensors")
    assert (loaded.model, loaded.fingerprint) == (made.model, made.fingerprint)
    assert loaded.provenance == made.provenance
    assert loaded.sha256 == made.sha256
    assert (loaded.ranks, loaded.nbytes) == (made.ranks, made.nbytes)
    assert loaded.stubs.keys() == made.stubs.keys()
    for index, stub in made.stubs.items():
        for ours, theirs in zip(loaded.stubs[index].parameters(), stub.parameters(), strict=True):
            assert ours.dtype == theirs.dtype == dtype
            assert torch.equal(ours, theirs)


def test_it_is_a_safetensors_file_that_others_can_read(path) -> None:
    made, tensors = StubLibrary.load(path), safetensors.torch.load_file(path)
    assert made.ranks == dict(
        zip(("layer00.attn", "layer00.ffn", "layer01.attn", "layer01.ffn"), RANKS, strict=True)
    )
    assert made.nbytes == sum(4 * 16 * (2 * rank + 1) for rank in RANKS)
    assert tensors["layer00.attn.down"].shape == (RANKS[0], 16)
    assert len(tensors) == 3 * len(RANKS)


def test_the_hash_depends_on_every_tensor_and_the_model_and_nothing_else() -> None:
    made = library()
    stubs = made.stubs
    hashes = {made.sha256, library(torch.bfloat16).sha256}
    hashes.add(StubLibrary(made.model, "0" * 64, stubs).sha256)
    hashes.add(StubLibrary(made.model, made.fingerprint, {0: stubs[0]}).sha256)
    hashes.add(StubLibrary(made.model, made.fingerprint, {1: stubs[0]}).sha256)
    for index, stub in stubs.items():
        for part in ("down", "up", "mean"):
            changed = random_stubs(tiny_llm())
            tensor = getattr(changed[index], part)
            if tensor.numel():
                with torch.no_grad():
                    tensor.view(-1)[0] += 1e-6
                hashes.add(StubLibrary(made.model, made.fingerprint, changed).sha256)
            else:
                assert stub.rank == 0
    assert len(hashes) == 5 + 3 * len(RANKS) - 2
    assert StubLibrary("elsewhere", made.fingerprint, stubs, {"other": 1}).sha256 == made.sha256


# Files that are refused


def test_a_missing_file(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no stub library at .*none; fit it again with"):
        StubLibrary.load(tmp_path / "none")


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_file(path, kept: int) -> None:
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match="truncated or not a stub library; fit it again with"):
        StubLibrary.load(path)


def test_every_changed_byte_is_detected(tmp_path) -> None:
    llm, path = tiny_llm(), tmp_path / "stubs.safetensors"
    StubLibrary(llm.name, llm.fingerprint, random_stubs(llm, (1,)), {"text": "some"}).save(path)
    content = path.read_bytes()
    for place in range(len(content)):
        edited = bytearray(content)
        edited[place] ^= 1 << place % 8
        path.write_bytes(edited)
        with pytest.raises(ArtifactError, match="fit it again with") as caught:
            StubLibrary.load(path)
    assert "was altered after it was written (checksum differs" in str(caught.value)
    assert b"some" in content
    path.write_bytes(content.replace(b"some", b"more"))
    with pytest.raises(ArtifactError, match=r"was altered after it was written \(checksum differs"):
        StubLibrary.load(path)


def test_files_of_another_kind(path, tmp_path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(3)}, path, {"kind": "poem", "format": "3"})
    with pytest.raises(
        ArtifactError, match=r"not a stub library of format 1, but 'poem' of format 3; fit it"
    ):
        StubLibrary.load(path)
    safetensors.torch.save_file({"a": torch.zeros(3)}, path)
    with pytest.raises(ArtifactError, match="but None of format None"):
        StubLibrary.load(path)
    save_artifact(path, "corpus", 1, {"tokens": []})
    with pytest.raises(ArtifactError, match="truncated or not a stub library"):
        StubLibrary.load(path)


def test_a_full_disk_leaves_the_older_file(path, tmp_path, monkeypatch) -> None:
    before = path.read_bytes()

    def full(_file: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFullError):
        library(text="other").save(path)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


# Models


@pytest.mark.parametrize("name", FAMILIES)
def test_attached_stubs_are_those_of_the_library(name: str, tmp_path) -> None:
    made = library(name=name)
    made.save(tmp_path / "stubs.safetensors")
    llm = tiny_llm(name)
    weights = weights_hash(llm.model)
    views = [lib.attach(llm) for lib in (made, StubLibrary.load(tmp_path / "stubs.safetensors"))]
    for mask in MASKS.values():
        found = []
        for view in views:
            with view.masked(mask):
                found.append(logits(view))
        assert torch.equal(*found)
        with llm.repaired(random_stubs(llm), "same").masked(mask):
            assert torch.equal(logits(llm), found[0])
    assert weights_hash(llm.model) == weights
    assert views[0].facts.repair == made.sha256
    assert llm.facts.repair == ""


def test_using_a_view_does_not_change_the_library(path) -> None:
    made = StubLibrary.load(path)
    view = made.attach(tiny_llm())
    with torch.no_grad(), view.masked(Plan.removing(0)):
        for name, tensor in view.model.named_parameters():
            if ".stub." in name:
                tensor.zero_()
    assert StubLibrary(made.model, made.fingerprint, made.stubs).sha256 == made.sha256


@pytest.mark.parametrize(
    "other",
    [tiny_llm(seed=1), tiny_llm(dtype=torch.bfloat16), tiny_llm("mistral"), tiny_llm(layers=3)],
    ids=["weights", "dtype", "family", "layers"],
)
def test_another_model_is_rejected(other) -> None:
    dtype = other.facts.dtype
    with pytest.raises(
        ArtifactError,
        match=rf"fitted on tiny-llama with other weights or another dtype than the {other.name} "
        rf"\({dtype}\) that is loaded; fit stubs for this model, or load the other one",
    ):
        library().attach(other)
