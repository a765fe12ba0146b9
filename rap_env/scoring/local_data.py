"""Runs lm-eval's own tasks on local files: only the data set is replaced.

A data root is a folder with one subfolder per task. A subfolder holds one JSON-lines file per
split, named after the split (``piqa/validation.jsonl``), with the fields that the task's config
reads. Splits without a file are set to null, so lm-eval scores a task without a test split on its
validation split.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rap_env.artifacts import package_json
from rap_env.errors import CorpusError

SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
EVALUATION_KEYS = ("test_split", "validation_split")

_TASKS: dict[str, Any] = package_json("rap_env.scoring", "lm_eval_tasks.json")
TASK_FOLDERS: dict[str, str] = {name: task["folder"] for name, task in _TASKS.items()}
"""Folders of well-known tasks inside lm-eval's folder of tasks."""

TASK_FIELDS = {name: tuple(task["fields"]) for name, task in _TASKS.items()}
"""Fields that a task's prompts read. A missing field does not always fail in lm-eval, because its
templates use the name of an unknown field as literal text."""

Rows = list[dict[str, Any]]


def known_name(task: str) -> str:
    """The task under whose name folder and fields are known: ``"blimp"`` for its members."""
    return "blimp" if task.startswith("blimp_") else task


def local_overrides(data_root: str | Path, task: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """Changes to a task's own lm-eval config that make it read local files.

    They are a function that returns the data set, and null for every split without a file.

    Raises:
        CorpusError: The folder, a file or a field is missing, or a file is not JSON lines.
    """
    folder = _task_folder(Path(data_root).expanduser(), task)
    split_names = {key: config[key] for key in SPLIT_KEYS if config.get(key)}
    rows = {
        split: read_rows(path, TASK_FIELDS.get(known_name(task), ()))
        for split in sorted(set(split_names.values()))
        if (path := folder / f"{split}.jsonl").is_file()
    }
    if not any(split_names.get(key) in rows for key in EVALUATION_KEYS):
        names = [f"{split_names[key]}.jsonl" for key in EVALUATION_KEYS if key in split_names]
        files = sorted(path.name for path in folder.iterdir()) or ["nothing"]
        raise CorpusError(
            f"The task {task!r} needs {' or '.join(names)} in {folder}, which holds "
            f"{', '.join(files)}; add the file."
        )
    nulls = {key: None for key, split in split_names.items() if split not in rows}
    return {"custom_dataset": dataset_maker(lambda: rows), **nulls}


def read_rows(path: Path, fields: tuple[str, ...] = ()) -> Rows:
    """The rows of a UTF-8 JSON-lines file, all of which must have the `fields`.

    Raises:
        CorpusError: It cannot be read, is empty, or a line is not an object with these fields.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"Cannot read {path} as UTF-8 text: {error}.") from None
    # Not splitlines(): JSON strings may hold other line separators, such as U+2028.
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise CorpusError(f"{path} has no rows; it must hold one JSON object per line.")
    return [_parse_row(path, number, line, fields) for number, line in lines]


def _parse_row(path: Path, number: int, line: str, fields: tuple[str, ...]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise CorpusError(
            f"Line {number} of {path} is not a JSON object ({error}); the file may be truncated."
        ) from None
    if not isinstance(row, dict):
        raise CorpusError(f"Line {number} of {path} is not a JSON object, but {line[:40]!r}.")
    missing = [field for field in fields if not _has(row, field)]
    if missing:
        raise CorpusError(
            f"Line {number} of {path} lacks the field {missing[0]!r}; it has "
            f"{', '.join(map(repr, row)) or 'none'}. Correct the file, or name another field."
        )
    return row


def _has(row: Any, field: str) -> bool:
    """Whether a row has a field, given as names joined by dots."""
    for name in field.split("."):
        if not isinstance(row, dict) or name not in row:
            return False
        row = row[name]
    return True


def _task_folder(root: Path, task: str) -> Path:
    if not root.is_dir():
        raise CorpusError(
            f"data_root {root} is not a folder; give one that holds a folder for each task, or set "
            "data_root to null to use the hub's data."
        )
    if not (root / task).is_dir():
        raise CorpusError(
            f"data_root {root} has no folder {task!r}; add {task}/SPLIT.jsonl, or remove the task."
        )
    return root / task


def dataset_maker(splits: Callable[[], Mapping[str, Sequence[Any]]]) -> Callable[..., Any]:
    """A function for lm-eval's ``custom_dataset``, from one that returns the rows of each split."""

    def make(**_metadata: Any) -> Any:
        from datasets import Dataset, DatasetDict

        return DatasetDict({name: Dataset.from_list(rows) for name, rows in splits().items()})

    return make
