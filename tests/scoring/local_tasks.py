"""Small files with the schema that lm-eval's own tasks read, written by the tests themselves."""

import json

_ARC = {
    "id": "q1",
    "question": "a b?",
    "choices": {"text": ["e", "c d", "f", "g"], "label": ["A", "B", "C", "D"]},
    "answerKey": "B",
}

ROWS = {
    "arc_challenge": _ARC,
    "arc_easy": _ARC,
    "blimp_causative": {"sentence_good": "a b.", "sentence_bad": "b a.", "pair_id": 0},
    "boolq": {"passage": "a b.", "question": "is it a", "label": 0, "idx": 3},
    "copa": {
        "premise": "a b.",
        "choice1": "It was so.",
        "choice2": "It was not.",
        "question": "cause",
        "label": 0,
        "idx": 0,
    },
    "hellaswag": {
        "activity_label": "Title",
        "ctx_a": "a b.",
        "ctx_b": "the c",
        "endings": ["d e.", "f g.", "h.", "i."],
        "label": "0",
    },
    "lambada_openai": {"text": "a b c d"},
    "openbookqa": {
        "id": "q2",
        "question_stem": "a b",
        "choices": {"text": ["c d", "e", "f", "g"], "label": ["A", "B", "C", "D"]},
        "answerKey": "A",
    },
    "piqa": {"goal": "a b", "sol1": "c", "sol2": "d e", "label": 1},
    "sciq": {
        "support": "s t.",
        "question": "a b?",
        "distractor1": "d",
        "distractor2": "e",
        "distractor3": "f",
        "correct_answer": "c",
    },
    "winogrande": {
        "sentence": "The cup fell because the _ was low.",
        "option1": "cup",
        "option2": "box",
        "answer": "2",
    },
}
"""One row of each task."""

SPLITS = {"lambada_openai": "test"}


def split_of(name):
    """The split that a task is scored on where only one file is there."""
    return "train" if name.startswith("blimp_") else SPLITS.get(name, "validation")


def write_task(root, name, *, split=None, count=3, rows=None):
    """Write a task's file; rows differ in a column that no prompt reads."""
    if rows is None:
        row = ROWS["blimp_causative"] if name.startswith("blimp_") else ROWS[name]
        rows = [{**row, "number": i} for i in range(count)]
    path = root / name / f"{split or split_of(name)}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
