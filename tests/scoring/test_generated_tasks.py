import logging
from collections import Counter

import pytest

from rap_env.scoring.generated_tasks import (
    FEWSHOT_DOCUMENTS,
    GENERATED_TASKS,
    PARADIGMS,
    RECALL_LENGTHS,
    RELATIONS,
    TEST_DOCUMENTS,
)

ALL = sorted(GENERATED_TASKS)
WHOLE = TEST_DOCUMENTS + FEWSHOT_DOCUMENTS


@pytest.mark.parametrize("name", ALL)
def test_documents_depend_on_the_seed_are_distinct_and_fewer_are_the_first_of_more(name):
    task = GENERATED_TASKS[name]
    documents = task.documents(0, WHOLE)
    assert task.documents(1, WHOLE) != documents
    keys = {(d["context"], *sorted(d["choices"])) for d in documents}
    assert len(documents) == len(keys) == WHOLE
    assert task.documents(0, 10) == documents[:10]
    assert task.documents(0, 10, skip=5) == documents[5:15]


@pytest.mark.parametrize("name", ALL)
def test_constant_guesses_score_at_chance(name):
    task = GENERATED_TASKS[name]
    documents = task.documents(0)
    count = 2 if name == "rap_minimal_pairs" else 4
    assert all(len(set(d["choices"])) == len(d["choices"]) == count for d in documents)
    places = Counter(d["gold"] for d in documents)
    for place in range(count):
        assert places[place] / len(documents) == pytest.approx(1 / count, abs=0.1)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("rap_minimal_pairs", len(PARADIGMS)),
        ("rap_recall", len(RECALL_LENGTHS)),
        ("rap_choice", len(RELATIONS)),
    ],
)
def test_the_first_documents_mix_all_kinds(name, kinds):
    documents = GENERATED_TASKS[name].documents(1)
    assert len({d["kind"] for d in documents[:kinds]}) == kinds
    counts = Counter(d["kind"] for d in documents).values()
    assert max(counts) - min(counts) <= 2


def test_a_minimal_pair_differs_in_one_word():
    for document in GENERATED_TASKS["rap_minimal_pairs"].documents(0):
        first, second = (choice.split() for choice in document["choices"])
        differing = sum(a != b for a, b in zip(first, second, strict=True))
        assert differing == 1, document
        assert document["context"] == ""


def test_word_frequency_does_not_solve_minimal_pairs():
    """What a model without context knows, the frequency of the differing words, is balanced."""
    good, bad = Counter(), Counter()
    for document in GENERATED_TASKS["rap_minimal_pairs"].documents(0, 4800):
        if document["kind"] == "polarity":
            continue
        right = set(document["choices"][document["gold"]].rstrip(".").split())
        wrong = set(document["choices"][1 - document["gold"]].rstrip(".").split())
        good.update(right - wrong)
        bad.update(wrong - right)
    paired = ("is", "are", "was", "were", "himself", "themselves", "much", "many", "that", "what")
    for word in paired:
        assert good[word] / (good[word] + bad[word]) == pytest.approx(0.5, abs=0.12), word


def test_recall_asks_for_a_value_that_its_list_holds_once():
    lengths = set()
    for document in GENERATED_TASKS["rap_recall"].documents(0, 40):
        *_, full, again = document["context"].split("List:\n")
        pairs = dict(line.split(" - ") for line in full.strip().split("\n"))
        shown, asked = again.split("\n")
        lengths.add(len(pairs))
        assert pairs[asked.removesuffix(" -")] == document["choices"][document["gold"]]
        assert set(document["choices"]) <= set(pairs.values())
        assert shown.split(" - ")[1] == pairs[shown.split(" - ")[0]]
        assert not shown.startswith(asked)
    assert lengths == set(RECALL_LENGTHS)


def test_choice_offers_answers_of_its_own_relation():
    facts = {r["name"]: r for r in RELATIONS}
    for document in GENERATED_TASKS["rap_choice"].documents(2):
        relation = facts[document["kind"]]
        question, pairs = relation["question"], relation["pairs"]
        answer = {question.format(known): right for known, right in pairs.items()}
        question = document["context"].removeprefix("Question: ").removesuffix("\nAnswer:")
        assert document["choices"][document["gold"]] == answer[question]
        assert set(document["choices"]) <= set(answer.values())


@pytest.mark.parametrize("name", ALL)
def test_they_are_genuine_lm_eval_tasks(name):
    tasks = pytest.importorskip("lm_eval.tasks")
    config = GENERATED_TASKS[name].lm_eval_config(seed=5)
    task = tasks.TaskManager(include_defaults=False).load([config])["tasks"][name]
    documents = GENERATED_TASKS[name].documents(5)
    assert [dict(doc) for doc in task.test_docs()] == documents
    assert task.OUTPUT_TYPE == "multiple_choice"
    assert task.VERSION == 1
    fewshot = [dict(doc) for doc in task.training_docs()]
    assert len(fewshot) == FEWSHOT_DOCUMENTS
    assert not any(doc in documents for doc in fewshot)


def test_silence_ends_with_its_last_user():
    datasets = pytest.importorskip("datasets")
    from rap_env.scoring import lm_eval_tasks

    logger, before = logging.getLogger("lm_eval"), logging.getLogger("lm_eval").level
    with lm_eval_tasks.quiet():
        with lm_eval_tasks.quiet():
            pass
        assert (logger.level, datasets.are_progress_bars_disabled()) == (logging.ERROR, True)
    assert (logger.level, datasets.are_progress_bars_disabled()) == (before, False)
