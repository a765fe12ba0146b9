"""Loads lm-eval's tasks quickly and without log lines and progress bars.

`TaskManager` reads all of lm-eval's 14,000 configs by default, which takes seconds. For tasks
whose folder is known, only that folder is read.

Tasks run on the hub's data or on local files, where only the data set is replaced. A data
root is a folder with one subfolder per task. A subfolder holds one JSON-lines file per split,
named after the split (``piqa/validation.jsonl``), with the fields that the task's config
reads. Splits without a file are set to null, so lm-eval scores a task without a test split on
its validation split.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rap_env.artifacts import package_json, read_rows
from rap_env.errors import CorpusError, InvalidRequestError, UnknownNameError
from rap_env.extras import require_extra
from rap_env.scoring.generated_tasks import GENERATED_TASKS, TEST_DOCUMENTS, dataset_maker
from rap_env.scoring.long_context_tasks import long_context_task
from rap_env.specs import check, setting

SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
EVALUATION_KEYS = ("test_split", "validation_split")

_TASKS: dict[str, Any] = package_json("rap_env.scoring", "lm_eval_tasks.json")
TASK_FOLDERS: dict[str, str] = {name: task["folder"] for name, task in _TASKS.items()}
"""Folders of well-known tasks inside lm-eval's folder of tasks."""

TASK_FIELDS = {name: tuple(task["fields"]) for name, task in _TASKS.items()}
"""Fields that a task's prompts read. A missing field does not always fail in lm-eval, because
its templates use the name of an unknown field as literal text."""

Rows = list[dict[str, Any]]

KNOWN_TASKS = (*GENERATED_TASKS, *(name for name in TASK_FOLDERS if name != "blimp"))
SCORABLE_OUTPUTS = ("multiple_choice", "loglikelihood")

log = logging.getLogger(__name__)

_NOISY = ("lm_eval", "transformers.tokenization_utils_base")


@dataclass(frozen=True)
class TaskConfig:
    """The tasks to score, and on how many documents.

    Attributes:
        names: Generated tasks (``rap_minimal_pairs``, ``rap_recall``, ``rap_choice``, and
            those of `rap_env.scoring.long_context_tasks`, such as ``rap_recall_1024``) or any
            task of lm-eval whose answers are scored by likelihoods. A group or tag of lm-eval
            stands for its tasks.
        limit: Number of documents of each task, drawn with `seed`; None for all. The first
            documents of a data set may all be of one kind: those of hellaswag have one
            source. Generated tasks have the first ones, since `seed` decides their content
            and kinds take turns.
        data_root: Folder of local data for lm-eval's own tasks, see
            `rap_env.scoring.lm_eval_tasks`; None uses the hub's data.
        num_fewshot: Solved examples before each question.
        seed: Chooses the documents of generated tasks, the sample of others and the few-shot
            examples.

    Raises:
        UnknownNameError: A name is not a string, or a misspelt generated task.
        InvalidRequestError: A number is out of range, or names are missing or repeated.
    """

    names: tuple[str, ...]
    limit: int | None = setting(None, low=1)
    data_root: str | None = None
    num_fewshot: int = setting(0, low=0)
    seed: int = setting(0, low=0)

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or not all(isinstance(n, str) for n in self.names):
            raise UnknownNameError("list of tasks", self.names, ['("rap_choice", "rap_recall")'])
        object.__setattr__(self, "names", tuple(self.names))
        if not self.names or len(set(self.names)) < len(self.names):
            raise InvalidRequestError(
                f"names must hold one task at least and none twice, not {list(self.names)}."
            )
        for name in self.names:
            if name.startswith("rap_") and not is_generated(name):  # no task of lm-eval does
                known = [*KNOWN_TASKS, "rap_recall_1024"]
                raise UnknownNameError("task", name, known, _ANY_OTHER)
        if self.data_root is not None:
            object.__setattr__(self, "data_root", str(self.data_root))
        check(self)


_quiet_lock = threading.RLock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress lm-eval's log lines below errors, its progress bars and those of `datasets`.

    Templates are compiled once. Standard error is not touched. Threads take turns, so that
    the last one restores the settings.
    """
    import datasets
    import lm_eval.api.task as lm_eval_task
    from lm_eval.utils import env

    no_bars = functools.partial(lm_eval_task.tqdm, disable=True)
    with (
        _quiet_lock,
        patch.object(lm_eval_task, "tqdm", no_bars),
        patch.object(env, "from_string", _compiled),
        contextlib.ExitStack() as restore,
    ):
        for logger in map(logging.getLogger, _NOISY):
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        if not datasets.are_progress_bars_disabled():
            restore.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        yield


@functools.lru_cache(maxsize=1024)
def _compiled(template: str) -> Any:
    """A template as lm-eval compiles it, which it would do again for each document."""
    from lm_eval.utils import env

    return type(env).from_string(env, template)


def load_task(name: str, config: TaskConfig, tokenizer: Any = None) -> Any:
    """Load one of a config's tasks as lm-eval's object: a generated one, or a task of lm-eval.

    Tasks of long contexts measure their texts with `tokenizer`. As in lm-eval, tasks that fix
    `num_fewshot` to 0 (such as blimp's) keep 0.

    Raises:
        UnknownNameError: There is no such task, or it is not scored by likelihoods.
        CorpusError: Its data is missing or does not match.
    """
    from lm_eval.api.task import ConfigurableTask

    long_context = long_context_task(name)
    if long_context is not None:
        count = config.limit or TEST_DOCUMENTS
        task = ConfigurableTask(config=long_context.lm_eval_config(tokenizer, config.seed, count))
    elif name in GENERATED_TASKS:
        task = ConfigurableTask(config=GENERATED_TASKS[name].lm_eval_config(config.seed))
    else:
        task = _load_named(name, config.data_root)
        _check_output(name, task.OUTPUT_TYPE)
    # A 0 in the task's own config stays 0, as in lm-eval's evaluator.
    if task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=config.num_fewshot)
    task.set_fewshot_seed(seed=config.seed)
    return task


def is_generated(name: str) -> bool:
    """Whether a task's documents are generated."""
    return name in GENERATED_TASKS or long_context_task(name) is not None


def members(names: Iterable[str]) -> Iterator[str]:
    """Names of tasks, with its tasks in the place of each group or tag of lm-eval.

    Raises:
        UnknownNameError: There is no such task, its config says that it is not scored by
            likelihoods, or a group changes the settings of its tasks.
    """
    for name in names:
        entry = None if is_generated(name) else _manager_for(name).task_index[name]
        if entry is None or entry.kind.name not in ("GROUP", "TAG"):
            yield name
            continue
        inside = sorted(entry.tags) if entry.kind.name == "TAG" else entry.cfg["task"]
        if not all(isinstance(task, str) for task in inside):
            hint = "It changes the settings of its tasks; name tasks one by one."
            raise UnknownNameError("likelihood task", name, KNOWN_TASKS, hint)
        yield from members(inside)


def check_scorable(names: Iterable[str]) -> None:
    """Check tasks before a model or a data set is loaded.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        UnknownNameError: As for `members`.
    """
    require_extra("eval", "Scoring tasks")
    with quiet():
        for _ in members(names):
            pass


_ANY_OTHER = "Any other task of lm-eval that is scored by likelihoods works too."


@functools.lru_cache(maxsize=len(TASK_FOLDERS) + 1)
def _manager(folder: str) -> Any:
    """A task manager over one folder of lm-eval's tasks, or over all of them (``""``)."""
    import lm_eval.tasks as package

    if not folder:
        log.info("Searching all of lm-eval's tasks, which takes some seconds.")
        return package.TaskManager()
    path = Path(package.__file__).parent / folder
    return package.TaskManager(include_path=str(path), include_defaults=False)


def _manager_for(name: str) -> Any:
    """A task manager that has the task, whose config is one that can be scored."""
    manager = _manager(TASK_FOLDERS.get(known_name(name), ""))
    if name not in manager.task_index:
        manager = _manager("")
    index = manager.task_index
    if name not in index:
        raise UnknownNameError("task", name, KNOWN_TASKS, _ANY_OTHER)
    _check_output(name, (index[name].cfg or {}).get("output_type"))
    return manager


def _check_output(name: str, output_type: str | None) -> None:
    """Check how a task is scored; None is unknown before the task is loaded."""
    if output_type not in (None, *SCORABLE_OUTPUTS):
        hint = f"It is scored by {output_type}; only {', '.join(SCORABLE_OUTPUTS)} can be."
        raise UnknownNameError("likelihood task", name, KNOWN_TASKS, hint)


def _load_named(name: str, data_root: str | None) -> Any:
    """A task of lm-eval, on the hub's data or on local files.

    A member of an inline group may override settings of the task that it names; this is
    lm-eval's way to change the data of a task.
    """
    manager = _manager_for(name)
    config: dict[str, Any] = {"task": name}
    if data_root is not None:
        config |= local_overrides(data_root, name, manager.task_index[name].cfg)
    try:
        (task,) = manager.load([{"group": name, "task": [config]}])["tasks"].values()
    except Exception as error:  # of the hub's client, or of a task's own templates and functions
        text = " ".join(str(error).split())[:200].removesuffix(".")
        where, remedy = "from the hub", "check the network, set data_root to a folder with its data"
        if data_root is not None:
            where, remedy = (
                f"in {data_root}",
                "compare its fields with the task's config in lm-eval",
            )
        raise CorpusError(
            f"Cannot load the data of the task {name!r} {where} ({type(error).__name__}: {text}); "
            f"{remedy}, or use the generated tasks {', '.join(GENERATED_TASKS)}."
        ) from error
    return task


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
