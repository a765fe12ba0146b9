"""Finding lm-eval's tasks, quickly and quietly.

`TaskManager` reads all of lm-eval's 14,000 configs unless told otherwise, which takes
seconds. Tasks whose folder is known are found by reading that folder alone.
"""

from __future__ import annotations

import contextlib
import functools
import io
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rap_env.errors import CorpusError, MissingDependencyError, UnknownNameError
from rap_env.scoring.generated_tasks import GENERATED_TASKS, lm_eval_config
from rap_env.scoring.local_data import local_overrides

TASK_FOLDERS: dict[str, str] = {
    "arc_challenge": "arc",
    "arc_easy": "arc",
    "blimp": "blimp",
    "boolq": "super_glue/boolq",
    "copa": "super_glue/copa",
    "hellaswag": "hellaswag",
    "lambada_openai": "lambada",
    "openbookqa": "openbookqa",
    "piqa": "piqa",
    "sciq": "sciq",
    "wikitext": "wikitext",
    "winogrande": "winogrande",
}
"""Folders of the tasks that are found at once, inside lm-eval's own."""

KNOWN_TASKS: tuple[str, ...] = (*GENERATED_TASKS, *TASK_FOLDERS)
SCORABLE_OUTPUTS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")

log = logging.getLogger(__name__)

_NOISY = ("lm_eval", "transformers.tokenization_utils_base")


@dataclass(frozen=True)
class LoadedTask:
    """A task or group as the user named it.

    Attributes:
        name: The name.
        tasks: lm-eval's task objects: one, or the members of the group.
        group: lm-eval's group object, or None.
    """

    name: str
    tasks: tuple[Any, ...]
    group: Any = None


def require_lm_eval() -> None:
    """Make sure that lm-eval and what it needs for transformers models is there.

    Raises:
        MissingDependencyError: It is not.
    """
    try:
        import datasets  # noqa: F401
        import lm_eval.models.huggingface
        import lm_eval.tasks  # noqa: F401
    except ImportError as error:
        missing = (error.name or "lm_eval").partition(".")[0]
        package = "lm-eval" if missing == "lm_eval" else missing
        raise MissingDependencyError(package, "Scoring tasks", "eval") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Let lm-eval work in silence: no log lines below errors, no progress bars.

    It also compiles each template once, where lm-eval does so anew for each document.
    """
    import datasets
    from lm_eval.utils import env

    loggers = [logging.getLogger(name) for name in _NOISY]
    levels = [logger.level for logger in loggers]
    had_bars = not datasets.are_progress_bars_disabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        datasets.disable_progress_bars()
        env.from_string = functools.cache(type(env).from_string.__get__(env))
        # lm-eval draws some bars without a way to turn them off; they go to this stream.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        vars(env).pop("from_string", None)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


def load_task(name: str, *, data_root: str | None, seed: int, num_fewshot: int) -> LoadedTask:
    """Load a task or group by name.

    Generated tasks need no data; others read `data_root` if it is given, else the hub.

    Args:
        name: A generated task, or any task, group or tag of lm-eval.
        data_root: Folder of local data, see `rap_env.scoring.local_data`.
        seed: Seeds the documents of generated tasks and the choice of few-shot examples.
        num_fewshot: Solved examples put before each question; as in lm-eval, tasks
            that fix it to 0 (such as blimp's) keep 0.

    Raises:
        UnknownNameError: There is no such task, or it is not scored by likelihoods.
        CorpusError: Its data is missing or does not fit.
    """
    if name in GENERATED_TASKS:
        config = lm_eval_config(GENERATED_TASKS[name], seed)
        loaded = _manager(None).load([config])
    else:
        loaded = _load_named(name, data_root)
    tasks = tuple(loaded["tasks"].values())
    for task in tasks:
        _check_output(name, task)
        # A 0 in the task's own config is kept, as lm-eval's evaluator does.
        if task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=num_fewshot)
        task.set_fewshot_seed(seed=seed)
    groups = loaded.get("groups") or {}
    return LoadedTask(name, tasks, next(iter(groups.values()), None))


def check_generated_name(name: str) -> None:
    """Refuse a misspelt generated task without asking lm-eval, where none begins so.

    Raises:
        UnknownNameError: The name begins with ``rap_`` and is none of ours.
    """
    if name.startswith("rap_") and name not in GENERATED_TASKS:
        raise UnknownNameError("task", name, KNOWN_TASKS, _ANY_OTHER)


_ANY_OTHER = "Any other task of lm-eval that is scored by likelihoods works too."


@functools.lru_cache(maxsize=4)
def _manager(folder: str | None) -> Any:
    """A task manager over one folder of lm-eval, over none (None), or over all (``""``)."""
    import lm_eval.tasks as package

    if folder is None:
        return package.TaskManager(include_defaults=False)
    if not folder:
        return package.TaskManager()
    path = Path(package.__file__).parent / folder
    return package.TaskManager(include_path=str(path), include_defaults=False)


def _manager_for(name: str) -> Any:
    """A manager that knows the task.

    Raises:
        UnknownNameError: lm-eval has no such task.
    """
    folder = TASK_FOLDERS.get("blimp" if name.startswith("blimp_") else name)
    manager = None if folder is None else _manager(folder)
    if manager is None or name not in manager.task_index:
        log.info("Looking through all of lm-eval's tasks for %r, which takes some seconds.", name)
        manager = _manager("")
    if name not in manager.task_index:
        near = _near(name, manager.all_tasks)
        raise UnknownNameError("task", name, KNOWN_TASKS, near or _ANY_OTHER)
    return manager


def _near(name: str, names: Iterable[str]) -> str:
    import difflib

    found = difflib.get_close_matches(name, names, n=4, cutoff=0.7)
    return f"lm-eval also has {', '.join(map(repr, found))}." if found else ""


def _load_named(name: str, data_root: str | None) -> dict[str, Any]:
    manager = _manager_for(name)
    if data_root is not None:
        return _load_local(manager, name, data_root)
    try:
        found: dict[str, Any] = manager.load([name])
    except Exception as error:  # the hub's client has no common base class for its errors
        raise CorpusError(
            f"Cannot load the data of the task {name!r} from the hub ({_brief(error)}); check "
            "the network, set data_root to a folder with the task's data, or take the generated "
            f"tasks {', '.join(GENERATED_TASKS)}."
        ) from error
    return found


def _load_local(manager: Any, name: str, data_root: str) -> dict[str, Any]:
    """Load a task or group with its data sets swapped.

    Members of an inline group may override settings of the task that they name, which is
    lm-eval's way to say "this task, but with that data".
    """
    index = manager.task_index
    leaves = list(_leaves(index, name))
    members = [
        {"task": leaf, **local_overrides(data_root, leaf, index[leaf].cfg)} for leaf in leaves
    ]
    try:
        tasks = manager.load([{"group": name, "task": members}])["tasks"]
    except Exception as error:  # whatever a task's own templates and functions raise
        raise CorpusError(
            f"The files of the task {name!r} in {data_root} do not fit what it reads: "
            f"{_brief(error)}. Compare their fields with the task's config in lm-eval."
        ) from error
    own = index[name].cfg or {}
    return {"tasks": tasks, "groups": _group(name, own, tasks) if "group" in own else {}}


def _group(name: str, config: Mapping[str, Any], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """lm-eval's group object with the group's own rule of aggregation."""
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig

    rule = config.get("aggregate_metric_list")
    group = Group.from_config(GroupConfig(group=name, aggregate_metric_list=rule))
    for task in tasks.values():
        group.add(task)
    return {name: group}


def _leaves(index: Any, name: str) -> Iterator[str]:
    """Names of the tasks of a task, group or tag, in lm-eval's order."""
    entry = index[name]
    if entry.kind.name == "TAG":
        members: Sequence[Any] = sorted(entry.tags)
    elif entry.kind.name == "GROUP":
        members = entry.cfg["task"]
    else:
        yield name
        return
    for member in members:
        if not isinstance(member, str) or member not in index:
            raise CorpusError(
                f"The group {name!r} changes its members' configs, which data_root does not "
                "support; name the members one by one."
            )
        yield from _leaves(index, member)


def _check_output(name: str, task: Any) -> None:
    if task.OUTPUT_TYPE not in SCORABLE_OUTPUTS:
        raise UnknownNameError(
            "likelihood task",
            name,
            KNOWN_TASKS,
            f"It is scored by {task.OUTPUT_TYPE}; only {', '.join(SCORABLE_OUTPUTS)} can be.",
        )


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}".removesuffix(".")
