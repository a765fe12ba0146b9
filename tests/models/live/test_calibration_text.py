"""Text for levels and costs: kinds in equal shares, the same each time, or a user's own."""

import json
import logging
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from rap_env.artifacts import read_rows
from rap_env.errors import CorpusError, UnsupportedModelError
from rap_env.models.live import calibration_text
from rap_env.models.live.calibration_text import (
    SELF_WRITTEN,
    SOURCE_FILES,
    calibration_windows,
    mixed_windows,
    user_windows,
)
from rap_env.models.live.elastic import ElasticLLM
from tests.serving.tokenizers import byte_llm, chat_tokenizer
from tests.tiny import tiny_llm

END = 0  # the only special token of the tokenizer of bytes
TEMPLATE = "{% for m in messages %}[{{ strftime_now('%d %b %Y') }}] {{ m.content }}</s>{% endfor %}"
CHAT = [{"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}]


def _decoded(llm: ElasticLLM, windows: torch.Tensor) -> list[str]:
    return [llm.tokenizer.decode(row) for row in windows]


def test_kinds_take_turns_and_have_no_special_tokens() -> None:
    llm = byte_llm()
    llm.tokenizer.chat_template = TEMPLATE
    windows = mixed_windows(llm, 7, 300)
    assert windows.shape == (7, 300)
    assert torch.equal(mixed_windows(llm, 7, 300), windows)
    assert END not in windows
    texts = _decoded(llm, windows)
    rows = read_rows(SELF_WRITTEN)
    told = [message for row in rows for message in row.get("messages", ())]
    chats = "".join(f"[01 Jan 2025] {message['content']}" for message in told)
    assert all(text in chats for text in texts[::3])
    articles = "\n\n".join(row["text"] for row in rows if row["kind"] == "article")
    assert all(text in articles for text in texts[1::3])
    library = Path(calibration_text.sysconfig.get_path("stdlib"))
    sources = "".join((library / name).read_text(encoding="utf-8") for name in SOURCE_FILES)
    assert all(text in sources for text in texts[2::3])
    assert len(set(texts)) == 7


def test_windows_begin_as_the_tokenizer_begins_a_text() -> None:
    llm = byte_llm()
    llm.tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", END)]
    )
    windows = mixed_windows(llm, 3, 40)
    assert (windows[:, 0] == END).all()
    assert END not in windows[:, 1:]


def test_the_text_in_the_package_is_enough_for_a_calibration(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kinds = [row["kind"] for row in read_rows(SELF_WRITTEN)]
    assert min(kinds.count(kind) for kind in ("chat", "article")) >= 12
    windows = calibration_windows(byte_llm())
    assert windows.shape == (48, 256)
    assert not caplog.records  # the model wrote nothing


def test_the_model_writes_what_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    llm = byte_llm()
    article = {"kind": "article", "text": "a" * 15 + "é" * 15 + "b" * 13}
    (tmp_path / "texts.jsonl").write_text(json.dumps(article))
    monkeypatch.setattr(calibration_text, "SELF_WRITTEN", tmp_path / "texts.jsonl")
    monkeypatch.setattr(calibration_text.sysconfig, "get_path", lambda _: str(tmp_path))
    with caplog.at_level(logging.WARNING):
        windows = mixed_windows(llm, 9, 15)
    # Windows 3 and 4 of the article end and begin within a letter.
    articles = _decoded(llm, windows[1::3])
    assert articles[:2] == ["a" * 15, "b" * 13 + "\n\n"]
    assert "writes 7 windows of 15 tokens itself" in caplog.text
    assert END not in windows
    llm.generate = None  # type: ignore[method-assign, assignment]  # it is written once
    assert torch.equal(mixed_windows(llm, 9, 15), windows)


def test_unknown_tokens_and_models_without_a_tokenizer() -> None:
    llm = tiny_llm(tokenizer=chat_tokenizer())
    windows = mixed_windows(llm, 6, 60)
    assert llm.tokenizer.unk_token_id not in windows
    assert mixed_windows(tiny_llm(), 6, 60).shape == windows.shape


def test_a_tokenizer_without_text() -> None:
    llm = byte_llm()
    llm.tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    with pytest.raises(UnsupportedModelError, match="tiny-bytes encodes text as no tokens"):
        mixed_windows(llm, 3, 20)


def test_windows_are_spread_over_a_users_text(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("".join(letter * 10 for letter in "abcdefgh") + "rest")
    assert _decoded(byte_llm(), user_windows(byte_llm(), path, 2, 10)) == ["c" * 10, "g" * 10]


def test_rows_of_chats_prompts_and_texts(tmp_path: Path) -> None:
    path, llm = tmp_path / "rows.jsonl", byte_llm()
    rows = [{"messages": CHAT}, {"prompt": "One?", "id": 1}, {"text": "Två."}]
    path.write_text("\n".join(map(json.dumps, rows)))
    plain = "user: How?\nassistant: So.\n\nOne?\n\nTvå.\n\n"
    (windows,) = user_windows(llm, path, 1, len(plain.encode()))
    assert llm.tokenizer.decode(windows) == plain
    llm.tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}</s>"
    (windows,) = user_windows(llm, path, 1, 23)
    assert llm.tokenizer.decode(windows) == "<How?><So.>One?\n\nTvå.\n\n"[:22]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abc", r"a\.txt has 3 tokens of tiny-bytes's tokenizer, but 40 are needed"),
        ("a.txt", b"\xff\xfe", r"Cannot read .*a\.txt as UTF-8 text"),
        ("a.txt", None, r"Cannot read .*a\.txt as UTF-8 text: .*No such file"),
        ("a.jsonl", b'{"text": "a"}\n{"te', r"Line 2 of .*a\.jsonl is not a JSON object"),
        ("a.jsonl", b'{"text": "a"}\n{"page": "b"}', r"Row 2 of .* has no text; it must have"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}', r"Row 1 of .* has no text"),
        ("a.jsonl", b'{"prompt": 5}', r"Row 1 of .* has no text"),
        ("a.jsonl", b"", r"has no rows"),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        user_windows(byte_llm(), tmp_path / name, 2, 20)
