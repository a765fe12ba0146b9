"""Streamed text has whole characters, equals a single decode, and ends at a stop string."""

from __future__ import annotations

import random

import pytest

from rap_env.serving.detokenizer import UNFINISHED, Detokenizer, StopStrings
from tests.serving.tokenizers import byte_tokenizer, metaspace_tokenizer

TEXTS = (
    "plain",
    "naïve \N{EN DASH} “quotes”",
    "你好世界",
    "👩‍👩‍👧 and 🇫🇷!",
    "ends in é",
    "\ufffd is a sign",
)


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_whole_characters_and_add_up(tokenizer, text):
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.add(token) for token in tokenizer.encode(text)]
    assert "".join(pieces) + detokenizer.finish() == text
    if UNFINISHED not in text:
        assert not any(UNFINISHED in piece for piece in pieces)
    assert len([piece for piece in pieces if piece]) <= len(text)


def test_streamed_bytes_equal_decoding_in_one_call(tokenizer):
    random_state = random.Random(0)
    for _ in range(30):
        ids = [random_state.randrange(1, 257) for _ in range(random_state.randrange(1, 60))]
        detokenizer = Detokenizer(tokenizer)
        found = "".join(map(detokenizer.add, ids)) + detokenizer.finish()
        assert found == tokenizer.decode(ids)


def test_invalid_bytes_are_not_held_back_forever(tokenizer):
    byte = tokenizer.encode("é")[0]
    detokenizer = Detokenizer(tokenizer)
    given = "".join(detokenizer.add(byte) for _ in range(500))
    assert len(given) >= 490
    assert len(given + detokenizer.finish()) == 500


def test_the_text_of_a_short_window_is_that_of_the_whole(tokenizer):
    text = "one two three " * 100
    detokenizer = Detokenizer(tokenizer)
    decoded = []
    original = tokenizer.decode
    detokenizer._tokenizer = type(
        "Counting",
        (),
        {"decode": lambda _, ids, **k: decoded.append(len(ids)) or original(ids, **k)},
    )()
    assert "".join(map(detokenizer.add, tokenizer.encode(text))) == text
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


def test_partial_stop_strings_are_released():
    stop = StopStrings(["\n\nUser:", "###"])
    pieces = ["Hello", "\n", "\n", "User", "s #", "#", " end ##"]
    given = [stop.add(piece) for piece in pieces]
    assert not stop.matched
    assert given[1:4] == ["", "", ""]
    assert "".join(given) == "Hello\n\nUsers ## end "
    assert stop.finish() == "##"


def test_without_stop_strings_text_is_not_held_back():
    stop = StopStrings()
    assert [stop.add("a"), stop.add(""), stop.add("b")] == ["a", "", "b"]
    assert stop.finish() == ""
