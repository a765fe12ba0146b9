"""Three small lm-eval tasks generated from templates, without hub, files or network.

- ``rap_minimal_pairs``: choose the grammatical one of two sentences that differ in a word.
- ``rap_recall``: recall the value of a key from a list of 4 to 32 pairs.
- ``rap_choice``: choose one of four answers to a short question about everyday things.

Documents depend on the seed only. Kinds of question (paradigms, list lengths, relations) take
turns, so that the first documents of a task have the same mix as all of them.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

from rap_env.artifacts import package_json

TEST_DOCUMENTS = 200
FEWSHOT_DOCUMENTS = 32
RECALL_LENGTHS = (4, 8, 16, 32)


_PAIR_WORDS: dict[str, Any] = package_json("rap_env.scoring", "minimal_pairs.json")
PARADIGMS: dict[str, dict[str, Any]] = _PAIR_WORDS["paradigms"]
"""Paradigms of minimal pairs, by name: words to ``draw``, and one or two ``cases`` of a
``text`` in which ``_`` is the right word or the wrong one. Each is as often right as wrong
(except in ``polarity``), so that a model that only knows word frequencies scores near one
half. A template reads the forms of a word by index, or by the drawn number: ``{verb[n]}``,
and the other, ``{verb[o]}``."""

_WORDS: dict[str, Any] = package_json("rap_env.scoring", "task_words.json")
NAMES, OBJECTS = _WORDS["names"], _WORDS["objects"]  # keys and values of the recall task
RELATIONS: list[dict[str, Any]] = _WORDS["relations"]
"""Relations between everyday words: ``name``, ``question`` with one ``{}`` for the known
word, and ``pairs`` of known words and answers. The wrong choices are answers of other
pairs."""


class Document(TypedDict):
    """One question.

    Attributes:
        context: The prompt; empty for minimal pairs.
        choices: The continuations that are compared.
        gold: Index of the correct choice.
        kind: Paradigm, list length or relation, for results by kind.
    """

    context: str
    choices: list[str]
    gold: int
    kind: str


def make_document(
    rng: random.Random, context: str, good: str, bad: list[str], kind: str
) -> Document:
    """A document with the correct choice at a random index."""
    choices = list(bad)
    gold = rng.randrange(len(bad) + 1)
    choices.insert(gold, good)
    return {"context": context, "choices": choices, "gold": gold, "kind": kind}


def _minimal_pairs(rng: random.Random) -> Iterator[Document]:
    for name, paradigm in itertools.cycle(PARADIGMS.items()):
        good, bad = _sentences(paradigm, rng)
        yield make_document(rng, "", good, [bad], name)


def _sentences(paradigm: Mapping[str, Any], rng: random.Random) -> list[str]:
    """A grammatical and an ungrammatical sentence of a paradigm."""
    drawn = _draw(paradigm["draw"], rng)
    case = paradigm["cases"][drawn.pop("case", 0)]
    drawn |= _draw(case.get("draw", {}), rng)
    number = drawn.pop("n", 0)
    words = {name: _forms(word, number) for name, word in drawn.items()}
    return [case["text"].replace("_", word).format_map(words) for word in case["words"]]


def _draw(sources: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    """One of each source, in order: a number below it, or one (for two names, two) of its words."""
    drawn: dict[str, Any] = {}
    for names, source in sources.items():
        words = _PAIR_WORDS[source] if isinstance(source, str) else source
        if isinstance(words, int):
            drawn[names] = rng.randrange(words)
        elif " " in names:
            drawn |= zip(names.split(), rng.sample(words, 2), strict=True)
        else:
            drawn[names] = rng.choice(words)
    return drawn


def _forms(word: str | Sequence[str], number: int) -> str | dict[int | str, str]:
    """A word as templates read it; of a list of forms also that of a number and the other one."""
    if isinstance(word, str):
        return word
    own = "herself" if word[0] in _PAIR_WORDS["female"] else "himself"
    return {**dict(enumerate(word)), "n": word[number], "o": word[1 - number], "self": own}


def _recall(rng: random.Random) -> Iterator[Document]:
    for length in itertools.cycle(RECALL_LENGTHS):
        names, values = rng.sample(NAMES, length), rng.sample(OBJECTS, length)
        shown, asked = rng.sample(range(length), 2)
        lines = [f"{name} - {value}\n" for name, value in zip(names, values, strict=True)]
        # One repeated pair indicates that the list is being repeated, not continued.
        context = f"List:\n{''.join(lines)}\nList:\n{lines[shown]}{names[asked]} -"
        good = values.pop(asked)
        yield make_document(rng, context, good, rng.sample(values, 3), f"{length} pairs")


def _choice(rng: random.Random) -> Iterator[Document]:
    decks: dict[str, list[tuple[str, str]]] = {relation["name"]: [] for relation in RELATIONS}
    for relation in itertools.cycle(RELATIONS):
        name, pairs = relation["name"], relation["pairs"]
        if not decks[name]:
            decks[name] = rng.sample(list(pairs.items()), len(pairs))
        known, good = decks[name].pop()
        others = sorted(set(pairs.values()) - {good})
        context = f"Question: {relation['question'].format(known)}\nAnswer:"
        yield make_document(rng, context, good, rng.sample(others, 3), name)


@dataclass(frozen=True)
class GeneratedTask:
    """One generated task.

    Attributes:
        name: Its name in lm-eval.
        stream: Yields documents endlessly from a random generator.
        version: Increased whenever the documents of a seed change.
    """

    name: str
    stream: Callable[[random.Random], Iterator[Document]]
    version: int = 1

    def documents(self, seed: int, count: int = TEST_DOCUMENTS, skip: int = 0) -> list[Document]:
        """Distinct documents; a larger `count` extends the list of a smaller one."""
        rng = random.Random(f"{self.name} {self.version} {seed}")
        seen: set[tuple[str, tuple[str, ...]]] = set()
        documents: list[Document] = []
        for document in self.stream(rng):
            key = (document["context"], tuple(sorted(document["choices"])))
            if key not in seen:
                seen.add(key)
                documents.append(document)
            if len(documents) == skip + count:
                return documents[skip:]
        raise AssertionError("streams do not end")

    def lm_eval_config(self, seed: int = 0) -> dict[str, Any]:
        """The task as an inline lm-eval config, for ``TaskManager.load([config])``.

        Few-shot examples are separate documents that are not among the tested ones.
        """

        def splits() -> dict[str, list[Document]]:
            train = self.documents(seed, FEWSHOT_DOCUMENTS, skip=TEST_DOCUMENTS)
            return {"train": train, "test": self.documents(seed)}

        config = multiple_choice_config(self.name, self.version, splits)
        return {**config, "training_split": "train"}


GENERATED_TASKS: dict[str, GeneratedTask] = {
    task.name: task
    for task in (
        GeneratedTask("rap_minimal_pairs", _minimal_pairs),
        GeneratedTask("rap_recall", _recall),
        GeneratedTask("rap_choice", _choice),
    )
}


def multiple_choice_config(
    name: str, version: int, splits: Callable[[], dict[str, list[Document]]]
) -> dict[str, Any]:
    """The lm-eval config of a task whose `Document`s a function returns by split."""
    return {
        "task": name,
        "custom_dataset": dataset_maker(splits),
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": version},
    }


def dataset_maker(splits: Callable[[], Mapping[str, Sequence[Any]]]) -> Callable[..., Any]:
    """A function for lm-eval's ``custom_dataset``, from one that returns the rows of each split."""

    def make(**_metadata: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({name: Dataset.from_list(rows) for name, rows in splits().items()})

    return make
