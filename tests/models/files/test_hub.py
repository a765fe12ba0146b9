import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants

from rap_env.errors import ModelNotAvailableError, UnsupportedModelError
from rap_env.models.files import hub
from rap_env.models.files.loading import load_llm
from tests.models.fake_hub import COMMIT, FakeHub
from tests.models.states import saved
from tests.tiny import tiny_model

IDS = torch.tensor([[5, 9, 33]])


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A model folder with extra files, as in hub repositories."""
    folder = saved(tmp_path / "checkpoint", dtype=torch.float32)
    (folder / "onnx").mkdir()
    (folder / "onnx" / "config.json").write_text("{}")
    (folder / "consolidated.safetensors").write_bytes(b"the same weights once more")
    return folder


Serve = Callable[..., FakeHub]


@pytest.fixture
def serve(lonely: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Starts a hub that has the checkpoint, and connects this machine to it."""
    hubs = []

    def start(repo_id: str = "org/tiny") -> FakeHub:
        fake = FakeHub(repo_id, checkpoint)
        hubs.append(fake)
        connect(monkeypatch, fake.url)
        return fake

    yield start
    for fake in hubs:
        fake.close()


def connect(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_a_hub_model_is_fetched_and_then_found_without_the_hub(serve: Serve) -> None:
    fake = serve()
    llm = load_llm("org/tiny", device="cpu", dtype="float32")
    assert llm.name == "org/tiny"
    assert torch.equal(llm.model(IDS).logits, tiny_model()(IDS).logits)
    assert set(fake.served) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
        "tokenizer_config.json",
    }  # fmt: skip
    fake.close()
    assert load_llm("org/tiny", device="cpu", dtype="float32").fingerprint == llm.fingerprint


def test_a_revision_can_be_named(serve: Serve) -> None:
    serve()
    assert load_llm(f"org/tiny@{COMMIT}", device="cpu").name == f"org/tiny@{COMMIT}"
    with pytest.raises(ModelNotAvailableError, match="org/tiny is not .*cannot be downloaded"):
        load_llm("org/tiny@v9")


def test_an_unknown_family_is_rejected_before_its_weights_are_fetched(serve, checkpoint) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))
    fake = serve()
    with pytest.raises(UnsupportedModelError, match=r"'mamba' are not known; known are .*llama"):
        load_llm("org/tiny")
    assert "config.json" in fake.served
    assert "model.safetensors" not in fake.served


def test_a_repository_without_weights_is_rejected(serve: Serve, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    serve()
    with pytest.raises(UnsupportedModelError, match=r"org/tiny has no weights .*GGUF file"):
        load_llm("org/tiny")


def test_a_half_fetched_model_is_completed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = serve()
    folder = hub.hub_folder("org/tiny", None, lambda _: None)
    (folder / "model.safetensors").unlink()  # as if killed before the weights were there
    assert hub.cached_hub_folder("org/tiny") is None
    assert hub.has_all_weights(hub.hub_folder("org/tiny", None, lambda _: None))
    assert fake.served.count("model.safetensors") == 1  # the hub's client had kept the content


def test_sharded_weights_need_every_shard(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path, max_shard_size="5KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert hub.has_all_weights(tmp_path)
    shards[0].unlink()
    assert not hub.has_all_weights(tmp_path)


def test_downloads_can_be_disabled(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = serve()
    monkeypatch.setenv("RAP_OFFLINE", "1")
    with pytest.raises(ModelNotAvailableError, match="org/tiny is not .* and RAP_OFFLINE or"):
        load_llm("org/tiny")
    assert not fake.served


def test_a_hub_that_rejects_the_connection(lonely: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connect(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(ModelNotAvailableError, match=r"org/tiny is not .*downloaded .*network"):
        load_llm("org/tiny")
