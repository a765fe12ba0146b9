"""Texts: reproducible, disjoint by role, and rejected with clear errors."""

import json
import re
from dataclasses import replace

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from rap_env.errors import CorpusError
from rap_env.plan import Plan
from rap_env.scoring.corpus import ROLE_SPANS, Corpus, CorpusConfig, ensure_disjoint
from rap_env.scoring.corpus_loading import load_corpus
from tests.tiny import tiny_llm, tiny_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def llm():
    return tiny_llm(tokenizer=tiny_tokenizer())


def test_the_model_writes_the_same_text_for_the_same_seed(cache):
    config = CorpusConfig(windows=3, window_tokens=10)
    first = load_corpus(config, llm(), progress=False)
    assert first.tokens.shape == (3, 10)
    assert first.tokens.dtype == torch.int64
    unable = llm()
    unable.generate = None  # reading the cached text must not write it again
    assert torch.equal(load_corpus(config, unable, progress=False).tokens, first.tokens)
    for file in (cache / "corpora").iterdir():
        file.unlink()
    assert torch.equal(load_corpus(config, llm(), progress=False).tokens, first.tokens)
    other = load_corpus(CorpusConfig(windows=3, window_tokens=10, seed=1), llm(), progress=False)
    assert other.sha256 != first.sha256


def test_self_written_text_has_no_special_tokens():
    model = llm()
    written = load_corpus(CorpusConfig(windows=20, window_tokens=12), model, progress=False)
    assert not set(model.tokenizer.all_special_ids) & set(written.tokens.unique().tolist())


def test_the_dense_model_writes_and_leaves_the_global_generator_and_the_mask_alone(cache):
    model, config = llm(), CorpusConfig(windows=2, window_tokens=8)
    dense = load_corpus(config, model, progress=False)
    next((cache / "corpora").iterdir()).unlink()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    with model.applied(Plan.removing(0, 1, 2)):
        assert torch.equal(load_corpus(config, model, progress=False).tokens, dense.tokens)
        assert model.plan == Plan.removing(0, 1, 2)
    assert torch.equal(torch.rand(3), expected)


def write_text(tmp_path, tokens=1000):
    letters = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ"
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(letters), (tokens,), generator=generator).tolist()
    path = tmp_path / "text.txt"
    path.write_text("".join(letters[i] for i in picks))
    return path


def test_roles_read_disjoint_parts_of_a_file(tmp_path):
    path = write_text(tmp_path)
    parts = {}
    for role, (low, high) in ROLE_SPANS.items():
        windows = round(1000 * (high - low)) // 20
        config = CorpusConfig(source=str(path), windows=windows, window_tokens=20, role=role)
        parts[role] = load_corpus(config, llm())
    ensure_disjoint(parts["calibration"], parts["report"])
    ensure_disjoint(parts["calibration"], parts["selection"])
    decoded = "".join(tiny_tokenizer().decode(row) for row in parts["calibration"].tokens)
    assert path.read_text().startswith(decoded)
    assert sum(part.tokens.numel() for part in parts.values()) == 1000


def test_windows_are_chosen_by_seed(tmp_path):
    path = str(write_text(tmp_path))
    chosen = [
        load_corpus(CorpusConfig(source=path, windows=5, window_tokens=20, seed=seed), llm())
        for seed in (0, 0, 1)
    ]
    assert torch.equal(chosen[0].tokens, chosen[1].tokens)
    assert not torch.equal(chosen[0].tokens, chosen[2].tokens)


def test_provenance_records_the_text_read(tmp_path):
    path = write_text(tmp_path)
    corpus = load_corpus(CorpusConfig(source=str(path), windows=4, window_tokens=16), llm())
    provenance = corpus.provenance
    assert provenance["source"] == f"{tmp_path.name}/text.txt"
    assert (provenance["windows"], provenance["window_tokens"], provenance["tokens"]) == (4, 16, 64)
    assert len(provenance["sha256"]) == len(provenance["text_sha256"]) == 64


def test_other_tokens_than_asked_for_are_refused(tmp_path):
    config = CorpusConfig(str(write_text(tmp_path)), windows=2, window_tokens=8)
    right = load_corpus(config, llm())
    asked = replace(config, sha256=right.sha256)
    assert torch.equal(load_corpus(asked, llm()).tokens, right.tokens)
    with pytest.raises(CorpusError, match="gives other tokens"):
        load_corpus(replace(asked, seed=1), llm())


def test_json_lines(tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(json.dumps({"page": "abc " * 30}) for _ in range(5)))
    config = CorpusConfig(source=str(path), windows=2, window_tokens=16, field="page")
    assert load_corpus(config, llm()).tokens.shape == (2, 16)
    with pytest.raises(CorpusError, match=r"Line 1 .* field 'text'"):
        load_corpus(CorpusConfig(source=str(path), windows=2, window_tokens=16), llm())


def test_overlap_is_found_wherever_it_starts():
    tokens = torch.randint(0, 50000, (4, 80), generator=torch.Generator().manual_seed(0))
    shifted = torch.randint(0, 50000, (1, 80), generator=torch.Generator().manual_seed(1))
    first = Corpus.of_tokens(tokens, role="calibration")
    ensure_disjoint(first, Corpus.of_tokens(shifted, role="report"))
    shifted[0, 40:] = tokens[2, 3:43]
    with pytest.raises(CorpusError, match="calibration and the report text share 32 tokens"):
        ensure_disjoint(first, Corpus.of_tokens(shifted, role="report"))


def test_impossible_settings(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("abc")
    for settings, message in (
        ({"source": "missing.txt"}, "Cannot read the text missing.txt"),
        ({"window_tokens": 1}, "window_tokens must be"),
        ({"source": str(short)}, r"has 3 tokens.*enough for 0 windows of 128"),
    ):
        with pytest.raises(CorpusError, match=message):
            load_corpus(CorpusConfig(**settings), llm())


def test_a_model_without_start_token_or_tokenizer(tmp_path):
    model = tiny_llm()
    model.model.generation_config.bos_token_id = model.model.config.bos_token_id = None
    with pytest.raises(CorpusError, match="no start token"):
        load_corpus(CorpusConfig(), model, progress=False)
    with pytest.raises(CorpusError, match="no tokenizer"):
        load_corpus(CorpusConfig(source=str(write_text(tmp_path))), model)


def test_an_unreachable_data_set_is_an_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CorpusError, match="Check the name and the network"):
        load_corpus(CorpusConfig(source="hub:nobody/nothing-at-all"), llm())


def same_tokens(tmp_path, rows, other, **settings) -> bool:
    """Whether rows, read with these settings, give the tokens of other rows or of a plain text."""
    path, plain = tmp_path / "rows.jsonl", tmp_path / "other.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    plain.write_text(other if isinstance(other, str) else "\n".join(map(json.dumps, other)))
    if isinstance(other, str):
        plain = plain.rename(tmp_path / "other.txt")
    of_rows, of_other = (
        load_corpus(CorpusConfig(str(source), windows=2, window_tokens=8, **given), llm())
        for source, given in ((path, settings), (plain, {}))
    )
    return of_rows.sha256 == of_other.sha256


def test_documents_that_are_repeated_are_read_once(tmp_path):
    rows = [{"text": f"passage {number} " * 40} for number in range(6) for _ in range(2)]
    assert same_tokens(tmp_path, rows, rows[::2])
    plain = "\n\n".join(row["text"] for row in rows[::2])
    assert same_tokens(tmp_path, rows, plain)


def test_fields_are_joined(tmp_path):
    rows = [{"question": f"how many {n} are", "answer": f"there are {n} of"} for n in range(60)]
    joined = [{"text": f"{row['question']} {row['answer']}"} for row in rows]
    assert same_tokens(tmp_path, rows, joined, field="question+answer")
    with pytest.raises(CorpusError, match="lacks the field 'reply'; it has 'question', 'answer'"):
        same_tokens(tmp_path, rows, joined, field="question+reply")


def test_texts_are_joined_and_spread():
    parts = {
        name: Corpus.of_tokens(torch.arange(start, start + 12).view(4, 3), role="calibration")
        for name, start in (("a", 0), ("b", 100))
    }
    whole = Corpus.concatenated(parts)
    assert torch.equal(whole.tokens, torch.cat([part.tokens for part in parts.values()]))
    assert (whole.provenance["source"], whole.provenance["role"]) == ("a+b", "calibration")
    assert whole.provenance["parts"]["b"]["sha256"] == parts["b"].sha256
    few = whole.spread(4)
    assert torch.equal(few.tokens, whole.tokens[[0, 2, 4, 6]])
    assert few.provenance["tokens"] == 12
    assert few.sha256 != whole.sha256
    with pytest.raises(CorpusError, match="windows must be from 1 to 8 .*, not 9"):
        whole.spread(9)
    with pytest.raises(CorpusError, match=r"these have \{'a': 3, 'c': 4\}"):
        Corpus.concatenated({"a": parts["a"], "c": Corpus.of_tokens(torch.zeros(2, 4).long())})


def test_windows_start_as_the_tokenizer_starts_a_text(tmp_path):
    path = str(write_text(tmp_path))
    settings = CorpusConfig(source=path, windows=3, window_tokens=16)
    plain = load_corpus(settings, llm())
    model = llm()
    start = model.tokenizer.convert_tokens_to_ids("<s>")
    model.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", start), ("</s>", start + 1)]
    )
    started = load_corpus(settings, model)
    assert started.tokens.shape == plain.tokens.shape
    assert (started.tokens[:, 0] == start).all()
    assert not torch.isin(started.tokens[:, 1:], torch.tensor([start, start + 1])).any()
    assert not (plain.tokens == start).any()


class TestRecallText:
    SETTINGS = CorpusConfig(source="recall", windows=2, window_tokens=2000)

    def test_each_fact_is_asked_for_after_the_text(self):
        model = llm()
        text = model.tokenizer.decode(load_corpus(self.SETTINGS, model).tokens[0])
        context, questions = text.split("\n\n")[-2:]
        answers = re.findall(r"The password of (\w+) is (\w+)\.", questions)
        assert len(answers) >= 5
        for name, word in answers:
            assert f"The password of {name} is {word}." in context

    def test_windows_are_full_and_differ_by_seed_and_role(self):
        texts = [
            load_corpus(replace(self.SETTINGS, **other), llm())
            for other in ({}, {}, {"seed": 1}, {"role": "report"})
        ]
        assert all(text.tokens.shape == (2, 2000) for text in texts)
        assert texts[0].sha256 == texts[1].sha256
        assert len({text.sha256 for text in texts}) == 3

    def test_half_of_the_windows_are_the_models_own(self):
        config = CorpusConfig(source="self+recall", windows=3, window_tokens=400)
        both = load_corpus(config, llm(), progress=False)
        own = load_corpus(replace(config, source="self", windows=2), llm(), progress=False)
        facts = load_corpus(replace(config, source="recall", windows=1), llm())
        assert torch.equal(both.tokens, torch.cat([own.tokens, facts.tokens]))
        assert both.provenance["source"] == "self+recall"

    def test_windows_without_room_are_rejected(self):
        with pytest.raises(CorpusError, match="do not fit into 90 tokens"):
            load_corpus(replace(self.SETTINGS, window_tokens=90), llm())
