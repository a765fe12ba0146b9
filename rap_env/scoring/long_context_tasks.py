"""A generated task of a given length in tokens, in which answers have to be read from the context.

It follows RULER (Hsieh et al. 2024), made easy enough for a model of 135M parameters, and is
scored by likelihoods instead of generation. A text of ``rap_recall_N`` has N tokens: filler
with 8 persons and their passwords; asked is the password of each. The wrong choices do not
occur in the text.

Facts are spread over the whole text: each is at a uniformly random place in a section of its
own. The questions of a text follow it, each after the right answers to the earlier ones. So
all of them are answered by one pass of the model, if the choices are single tokens. No choice
occurs in an earlier answer; a model that has not seen the fact can only guess.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rap_env.artifacts import package_json
from rap_env.errors import CorpusError, InvalidRequestError, UnknownNameError
from rap_env.scoring.generated_tasks import (
    NAMES,
    OBJECTS,
    TEST_DOCUMENTS,
    Document,
    make_document,
    multiple_choice_config,
)

LEAST_TOKENS = 512
CHOICES = 4
DEPTHS = 5
"""Sections of a text by which results are told apart."""

_VERSION = 1
_WORDS: dict[str, list[str]] = package_json("rap_env.scoring", "long_context_words.json")
_NAME = re.compile(r"rap_(?P<kind>[a-z]+)_(?P<tokens>[0-9]+)")
_PROMPT = "The password of {} is"
_PERSONS = 8
_LEAD = (
    "The following text tells what some people did on some days, and it also tells the secret "
    "passwords of a few of them. At the end you have to know the password of each person, so read "
    "the text carefully."
)  # longer than the tokens at the start that every window of a cache keeps
_LEAST_FACTS = 2
_TOKENS_PER_FACT = 40  # of a text to measure on: fact, question with answer, and filler


class _Question(NamedTuple):
    """A question at the end of a text.

    Attributes:
        prompt: What the answer continues.
        answer: The right answer.
        wrong: The other choices.
        fact: Number of the fact that has the answer.
    """

    prompt: str
    answer: str
    wrong: list[str]
    fact: int


class _Content(NamedTuple):
    """What a text holds.

    Attributes:
        facts: Sentences in the order of the text.
        questions: The questions in their order.
        filler: Endless pieces between the facts.
    """

    facts: list[str]
    questions: list[_Question]
    filler: Iterator[str]


def _sentences(rng: random.Random) -> Iterator[str]:
    """Filler: sentences about people who have no names."""
    times, adjectives, people, actions, places = (
        _WORDS[name] for name in ("times", "adjectives", "people", "actions", "places")
    )
    while True:
        who = f"the {rng.choice(adjectives)} {rng.choice(people)}"
        yield f"{rng.choice(times)} {who} {rng.choice(actions)} {rng.choice(places)}."


def _passwords(rng: random.Random, persons: int, choices: int = CHOICES) -> _Content:
    """Facts about the passwords of persons, and a question about each."""
    names = rng.sample(NAMES, persons)
    words = rng.sample(OBJECTS, len(OBJECTS))
    pairs = [(name, words.pop()) for name in names]
    asked = list(pairs)
    rng.shuffle(pairs)
    rng.shuffle(asked)
    questions = [
        _Question(
            _PROMPT.format(name),
            word,
            rng.sample(words, choices - 1),
            pairs.index((name, word)),
        )
        for name, word in asked
    ]
    facts = [f"{_PROMPT.format(name)} {word}." for name, word in pairs]
    return _Content(facts, questions, _sentences(rng))


@dataclass(frozen=True)
class LongContextTask:
    """The generated task of one length.

    Attributes:
        tokens: Most tokens of a text with its questions and answers; texts are at most a
            piece of filler shorter.

    Raises:
        InvalidRequestError: There are fewer than `LEAST_TOKENS` tokens.
    """

    tokens: int

    def __post_init__(self) -> None:
        if self.tokens < LEAST_TOKENS:
            raise InvalidRequestError(
                f"The texts of {self.name} must have at least {LEAST_TOKENS} tokens, not "
                f"{self.tokens}."
            )

    @property
    def name(self) -> str:
        """Its name in lm-eval."""
        return f"rap_recall_{self.tokens}"

    def documents(self, tokenizer: Any, seed: int, count: int = TEST_DOCUMENTS) -> list[Document]:
        """The first documents of a seed, with texts measured by a tokenizer.

        Raises:
            InvalidRequestError: Facts and questions alone have too many tokens.
        """
        texts = (
            document
            for number in itertools.count()
            for document in self._text(
                tokenizer, random.Random(f"{self.name} {_VERSION} {seed} {number}")
            )
        )
        return list(itertools.islice(texts, count))

    def _text(self, tokenizer: Any, rng: random.Random) -> list[Document]:
        """The documents of one text."""
        content = _passwords(rng, _PERSONS)
        contexts = _tails(content)
        whole = f"{contexts[-1]} {content.questions[-1].answer}"
        depths = [(n + rng.random()) / len(content.facts) for n in range(len(content.facts))]
        text = _fill(content, depths, whole, tokenizer, self.tokens)
        if text is None:
            raise InvalidRequestError(
                f"The facts and questions of {self.name} have more than {self.tokens} tokens with "
                "this model's tokenizer; choose a longer task."
            )
        documents = []
        for tail, question in zip(contexts, content.questions, strict=True):
            section = int(depths[question.fact] * DEPTHS)
            kind = f"depth {100 * section // DEPTHS}-{100 * (section + 1) // DEPTHS} %"
            context = f"{text}\n\n{tail}"
            documents.append(make_document(rng, context, question.answer, question.wrong, kind))
        return documents

    def lm_eval_config(self, tokenizer: Any, seed: int, count: int) -> dict[str, Any]:
        """The task as an inline lm-eval config with its first documents."""
        config = multiple_choice_config(
            self.name, _VERSION, lambda: {"test": self.documents(tokenizer, seed, count)}
        )
        # An example would be as long as the document itself.
        return {**config, "num_fewshot": 0}


def recall_text(tokenizer: Any, tokens: int, rng: random.Random) -> str | None:
    """Facts in filler, then the question after each of them with its answer: text to measure on.

    The answers, some 3 % of the tokens, can only be predicted by a model that recalls the
    facts.

    Args:
        tokenizer: A tokenizer.
        tokens: Tokens of the text; it may have up to a piece of filler fewer.
        rng: All randomness comes from it.

    Returns:
        The text; None if so few tokens hold no two facts.
    """
    facts = min(tokens // _TOKENS_PER_FACT, len(NAMES))
    while facts >= _LEAST_FACTS:
        content = _passwords(rng, facts, choices=1)
        tail = f"{_tails(content)[-1]} {content.questions[-1].answer}."
        depths = [(n + rng.random()) / facts for n in range(facts)]
        text = _fill(content, depths, tail, tokenizer, tokens)
        if text is not None:
            return f"{text}\n\n{tail}"
        facts //= 2
    return None


def long_context_task(name: str) -> LongContextTask | None:
    """The task of a name such as ``rap_recall_1024``; None if the name has another form.

    Raises:
        UnknownNameError: There is no such kind.
        InvalidRequestError: The length is too short.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        return None
    if match["kind"] != "recall":
        raise UnknownNameError("task", name, [f"rap_recall_{match['tokens']}"])
    return LongContextTask(int(match["tokens"]))


def _tails(content: _Content) -> list[str]:
    """What follows the text up to each question's answer."""
    tails, before = [], ""
    for question in content.questions:
        tail = " ".join(filter(None, (before, question.prompt)))
        tails.append(tail)
        before = f"{tail} {question.answer}."
    return tails


def _fill(
    content: _Content, depths: Sequence[float], tail: str, tokenizer: Any, tokens: int
) -> str | None:
    """Facts in filler, as many pieces as there is room for; None if there is no room for any."""
    left = tokens - _count(tokenizer, f"{_LEAD}\n\n{tail}")
    left -= sum(_count(tokenizer, f" {fact}") for fact in content.facts)
    pieces: list[str] = []
    for piece in content.filler:
        left -= _count(tokenizer, f" {piece}")
        if left < 0:
            break
        pieces.append(piece)
    while pieces:  # tokens of pieces need not add up to those of the text
        text = _placed(content, pieces, depths)
        if _count(tokenizer, f"{text}\n\n{tail}") <= tokens:
            return text
        pieces.pop()
    return None


def _placed(content: _Content, pieces: Sequence[str], depths: Sequence[float]) -> str:
    """The text: facts at their depths among pieces of filler."""
    facts = [(depth * len(pieces), fact) for depth, fact in zip(depths, content.facts, strict=True)]
    placed = sorted([*facts, *((n + 0.5, piece) for n, piece in enumerate(pieces))])
    return " ".join((_LEAD, *(piece for _, piece in placed)))


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, verbose=False)["input_ids"])


def check_fits(task: LongContextTask, max_positions: int, model: str) -> None:
    """Raise a `CorpusError` if the texts of a task are longer than the model's positions."""
    if task.tokens > max_positions:
        raise CorpusError(
            f"The texts of {task.name} have {task.tokens} tokens, more than the {max_positions} "
            f"positions of {model}; choose a shorter task."
        )
