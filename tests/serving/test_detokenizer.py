"""Tokens of texts and messages, and streamed text: whole characters that end at a stop string."""

import random
from types import SimpleNamespace

import pytest

from rap_env.serving.generation import UNFINISHED, Detokenizer, StopStrings
from tests.serving.conftest import served
from tests.serving.fake_engine import FakeEngine
from tests.serving.test_app import CHAT, PLAIN, error_of, post
from tests.serving.tokenizers import byte_tokenizer, metaspace_tokenizer
from tests.tiny import tiny_tokenizer

TEXTS = (
    "plain",
    "naïve \N{EN DASH} “quotes”",
    "你好世界",
    "👩‍👩‍👧 and 🇫🇷!",
    "ends in é",
    "\ufffd is a sign",
)


@pytest.fixture(scope="module")
def by_bytes():
    return byte_tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_add_up(by_bytes, text):
    detokenizer = Detokenizer(by_bytes)
    pieces = [detokenizer.add(token) for token in by_bytes.encode(text)]
    assert "".join(pieces) + detokenizer.finish() == text
    if UNFINISHED not in text:
        assert not any(UNFINISHED in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) <= len(text)


def test_any_bytes_equal_decoding_in_one_call_and_are_not_held_back_forever(by_bytes):
    draw = random.Random(0)
    for _ in range(30):
        ids = [draw.randrange(1, 257) for _ in range(draw.randrange(1, 60))]
        detokenizer = Detokenizer(by_bytes)
        text = "".join(map(detokenizer.add, ids)) + detokenizer.finish()
        assert text == by_bytes.decode(ids)
    byte = by_bytes.encode("é")[0]
    detokenizer = Detokenizer(by_bytes)
    given = "".join(detokenizer.add(byte) for _ in range(500))
    assert len(given) >= 490
    assert len(given + detokenizer.finish()) == 500


def test_the_text_of_a_short_window_is_that_of_the_whole(by_bytes):
    text, decoded = "one two three " * 100, []

    def decode(ids, **options):
        decoded.append(len(ids))
        return by_bytes.decode(ids, **options)

    detokenizer = Detokenizer(SimpleNamespace(decode=decode))
    assert "".join(map(detokenizer.add, by_bytes.encode(text))) == text
    assert max(decoded) <= 3


def test_spaces_before_words_survive_and_special_tokens_are_no_text():
    tokenizer = metaspace_tokenizer()
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in (3, 6, 0, 4, 2, 0, 5)]
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(
        [3, 6, 4, 2, 5], clean_up_tokenization_spaces=False
    )
    assert "".join(pieces).startswith("ones two")


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["abc", "def"], ["cd"], "ab"),
        (["a", "b", "c", "d"], ["bcd"], "a"),
        (["ab", "ab", "abc"], ["abc"], "abab"),
        (["aab"], ["ab", "aab"], ""),
        (["one", " st", "op"], ["stop"], "one "),
        (["xSTOPy", "zEND"], ["END", "STOP"], "x"),
        (["你", "好"], ["好"], "你"),
    ],
)
def test_text_ends_before_the_first_stop_string(pieces, stops, expected):
    stop = StopStrings(stops)
    text = "".join(map(stop.add, pieces))
    assert stop.matched
    assert text == expected
    assert stop.add("more") == stop.finish() == ""


def test_partial_stop_strings_are_released_and_without_any_no_text_is_held_back():
    stop = StopStrings()
    assert [stop.add("a"), stop.add(""), stop.add("b")] == ["a", "", "b"]
    assert stop.finish() == ""
    stop = StopStrings(["\n\nUser:", "###"])
    pieces = ["Hello", "\n", "\n", "User", "s #", "#", " end ##"]
    given = [stop.add(piece) for piece in pieces]
    assert not stop.matched
    assert given[1:4] == ["", "", ""]
    assert "".join(given) == "Hello\n\nUsers ## end "
    assert stop.finish() == "##"


def test_special_tokens_are_added_to_texts():
    tokenizer = byte_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", 0)]
    )
    with served(FakeEngine(tokenizer), tokenizer) as server:
        post(server, {**PLAIN, "prompt": "a"}, "completions")
        ids = server.service.engine.handles[-1].prompt_ids
        assert len(ids) == 2
        assert tokenizer.decode(ids) == "</s>a"


def test_a_missing_chat_template_is_reported():
    tokenizer = tiny_tokenizer()
    with served(FakeEngine(tokenizer), tokenizer) as server:
        error = error_of(post(server, CHAT), 400)
        assert error["code"] == "no_chat_template"
        assert "/v1/completions" in error["message"]
        assert post(server, PLAIN, "completions").status_code == 200
