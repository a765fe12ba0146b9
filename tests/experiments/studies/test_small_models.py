"""Small models trained from scratch: text, block costs, and folders that are used already."""

import math
from dataclasses import replace

import numpy as np
import pytest

from experiments.config import Config
from experiments.config.common import TextConfig
from experiments.config.model import ModelConfig
from experiments.config.studies import SmallModelConfig
from experiments.profile import profile
from experiments.studies.small_models import (
    BOS,
    Trainer,
    train_small_model,
    train_tokenizer,
)
from experiments.study.errors import ExperimentError
from rap_env.errors import CorpusError, UnknownNameError
from rap_env.memory import MemoryModel
from rap_env.models.files.loading import load_llm
from rap_env.models.files.model_folder import manifest_source
from rap_env.request import Request
from rap_env.scoring.corpus import CorpusConfig
from rap_env.scoring.corpus_loading import load_corpus
from rap_env.scoring.scorer import MaskScorer

STEPS = 30
WINDOW_TOKENS = 24
WORDS = ["the", "a", "cat", "dog", "bird", "saw", "took", "gave", "red", "stone", "river", "near"]


def sentences(words: list[str], count: int) -> str:
    drawn = np.random.default_rng(0).choice(words, size=(count, 6))
    return "\n".join(" ".join(row) + "." for row in drawn)


@pytest.fixture
def make(tmp_path):
    """Settings for a model that is trained in a second."""
    path = tmp_path / "text.txt"
    path.write_text(sentences(WORDS, 900))

    def config(family="uniform", run="run", **changes) -> Config:
        text = TextConfig(source=str(path), windows=60, window_tokens=WINDOW_TOKENS)
        small = SmallModelConfig(
            family=family, layers=4, hidden_size=16, heads=2, ffn_size=16, experts=3,
            expert_size=12, sliding_window_tokens=6, max_positions=64, vocab_size=300,
            steps=STEPS, batch_windows=4, learning_rate=1e-2, texts={"words": text},
            held_out_windows=5,
        )  # fmt: skip
        return Config(
            stage="small_models", name=run, runs_dir=str(tmp_path / "runs"), progress=False,
            store=None, model=ModelConfig(name="unused", device="cpu", dtype="float32"),
            small_models=replace(small, **changes),
        )  # fmt: skip

    return config


def trained(config: Config):
    return train_small_model(config, config.stage_dir("small_models"))


@pytest.mark.parametrize("family", ["uniform", pytest.param("unequal", marks=pytest.mark.slow)])
def test_it_learns_and_is_an_ordinary_model_folder(family, make):
    config = make(family)
    path = trained(config)
    record, llm = manifest_source(path), load_llm(path, device="cpu", dtype="float32")
    text = CorpusConfig(
        source=config.small_models.texts["words"].source, windows=5, window_tokens=WINDOW_TOKENS,
        role="selection",
    )  # fmt: skip
    nll = MaskScorer(llm, load_corpus(text, llm)).dense_nll
    assert record["held_out_nll"] == {"words": pytest.approx(nll, abs=1e-6)}
    assert nll < math.log(len(llm.tokenizer)) - 1
    assert record["steps"] == STEPS
    assert record["parameters"] == llm.model.num_parameters()
    assert llm.num_blocks == 8
    assert sorted(file.name for file in path.parent.iterdir() if not file.name.startswith(".")) == [
        "config.yaml", "model", "run.json",
    ]  # fmt: skip


@pytest.mark.slow
def test_blocks_cost_the_same_or_not_by_family(make):
    request = Request(2, 40, budget_bytes=2**40)
    uniform = MemoryModel(load_llm(trained(make("uniform", "a"))))
    freed = uniform.freed_bytes(request).reshape(4, 2)
    assert len({*freed[:, 0]}) == len({*freed[:, 1]}) == 1
    unequal = MemoryModel(load_llm(trained(make("unequal", "b"))))
    freed = unequal.freed_bytes(request).reshape(4, 2)
    assert unequal.facts.kv_window_tokens == (5, None, 5, None)
    assert len({*map(tuple, freed)}) == 4  # each combination of cheap and dear blocks
    assert freed[1, 0] == freed[3, 0] > freed[0, 0] == freed[2, 0]
    assert freed[1, 1] == freed[2, 1] > freed[0, 1] == freed[3, 1]


def test_it_writes_text_and_can_be_profiled(make, tmp_path):
    path = trained(make())
    llm = load_llm(path)
    text = load_corpus(CorpusConfig(windows=2, window_tokens=20), llm, progress=False)
    written = llm.tokenizer.decode(text.tokens.flatten())
    known = [letter in " .\n" + "".join(WORDS) for letter in written]
    assert sum(known) > 0.8 * len(known)
    config = replace(
        make(), stage="profile", model=ModelConfig(name=str(path)),
        calibration=TextConfig(source="self", windows=2, window_tokens=20),
        importance={"gsi_removals": 2},
    )  # fmt: skip
    assert profile(config, tmp_path / "profile").exists()


def test_model_and_tokenizer_are_trained_on_the_calibration_part_only(make, tmp_path):
    first, rest = sentences(WORDS, 1000), sentences([word.upper() for word in WORDS], 1700)
    assert len(first) < 0.42 * len(first + rest)
    path = tmp_path / "two_kinds.txt"
    path.write_text(first + rest)
    text = TextConfig(source=str(path), windows=60, window_tokens=WINDOW_TOKENS)
    llm = load_llm(trained(make(texts={"both": text})))
    entries = [entry for entry in llm.tokenizer.get_vocab() if entry.isalpha()]
    assert any(len(entry) > 1 for entry in entries if entry.islower())
    assert not any(len(entry) > 1 for entry in entries if entry.isupper())
    rare = llm.tokenizer("RIVER", add_special_tokens=False)["input_ids"]
    known = llm.tokenizer(" river", add_special_tokens=False)["input_ids"]
    assert len(rare) == 5 > len(known)


def test_a_finished_model_is_not_trained_again_and_other_settings_are_rejected(make, monkeypatch):
    path = trained(make())

    def updated(*_: object) -> float:
        raise AssertionError("it was trained again")

    monkeypatch.setattr(Trainer, "_update", updated)
    assert trained(make()) == path
    with pytest.raises(ExperimentError, match="another learning_rate"):
        trained(make(learning_rate=1e-3))
    with pytest.raises(ExperimentError, match="another seed"):
        trained(replace(make(), seed=1))


def test_a_folder_with_other_content_is_not_modified(make, tmp_path):
    other = tmp_path / "mine"
    other.mkdir()
    (other / "notes.txt").write_text("keep")
    for place in (other, other / "notes.txt"):
        with pytest.raises(ExperimentError, match="something else"):
            trained(make(path=str(place)))
    assert (other / "notes.txt").read_text() == "keep"


def test_the_tokenizer_round_trips_any_text():
    tokenizer = train_tokenizer([sentences(WORDS, 50)], vocab_size=280, max_positions=64)
    text = "  Grüße, 世界!\n\tthe cat 🐈"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) <= 280
    assert tokenizer.bos_token_id == tokenizer(BOS)["input_ids"][0]
    again = train_tokenizer([sentences(WORDS, 50)], vocab_size=280, max_positions=64)
    assert again.get_vocab() == tokenizer.get_vocab()


def test_invalid_settings_are_rejected(make, tmp_path):
    with pytest.raises(UnknownNameError, match=r"small_models\.family.*uniform"):
        make(family="mixed")
    with pytest.raises(ExperimentError, match=r"small_models\.texts has no text"):
        trained(make(texts={}))
    with pytest.raises(ExperimentError, match="8 heads, not 24"):
        make(heads=8, hidden_size=24)
    with pytest.raises(ExperimentError, match=r"small_models\.vocab_size must be at least 258"):
        make(vocab_size=100)
    short = TextConfig(source=str(tmp_path / "text.txt"), windows=4000, window_tokens=24)
    with pytest.raises(CorpusError, match="Give a longer text"):
        trained(make(texts={"short": short}))
