"""Loads lm-eval's tasks quickly and without log lines and progress bars.

`TaskManager` reads all of lm-eval's 14,000 configs by default, which takes seconds. For tasks
whose folder is known, only that folder is read.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rap_env.errors import CorpusError, InvalidRequestError, UnknownNameError, check_name
from rap_env.extras import require_extra
from rap_env.scoring.generated_tasks import GENERATED_TASKS, TEST_DOCUMENTS
from rap_env.scoring.local_data import TASK_FOLDERS, known_name, local_overrides
from rap_env.scoring.long_context_tasks import LONG_CONTEXT_KINDS, long_context_task
from rap_env.specs import check_types

KNOWN_TASKS: tuple[str, ...] = (*GENERATED_TASKS, *TASK_FOLDERS)
SCORABLE_OUTPUTS = ("multiple_choice", "loglikelihood", "loglikelihood_rolling")
DOCUMENTS = ("sample", "first")
"""Which documents of a task a limit leaves."""

log = logging.getLogger(__name__)

_NOISY = ("lm_eval", "transformers.tokenization_utils_base")


@dataclass(frozen=True)
class TaskConfig:
    """The tasks to score, and on how many documents.

    Attributes:
        names: Generated tasks (``rap_minimal_pairs``, ``rap_recall``, ``rap_choice``, and those of
            `rap_env.scoring.long_context_tasks`, such as ``rap_recall_1024``) or any task or group
            of lm-eval that is scored by likelihoods.
        limit: Number of documents of each task (of each member of a group); None for all.
        documents: Which ones, if there is a `limit`: ``"sample"``, drawn with `seed`, or
            ``"first"``, as with lm-eval's own limit. The first documents of a data set may all be
            of one kind: those of hellaswag have one source. Generated tasks always have the first
            ones, since `seed` decides their content and kinds take turns.
        data_root: Folder of local data for lm-eval's own tasks, see
            `rap_env.scoring.local_data`; None uses the hub's data.
        num_fewshot: Solved examples before each question.
        seed: Chooses the documents of generated tasks, the sample of others and the few-shot
            examples.

    Raises:
        UnknownNameError: A name is not a string, or a misspelt generated task; or there is no
            such value of `documents`.
        InvalidRequestError: A number is out of range, or names are missing or repeated.
    """

    names: tuple[str, ...]
    limit: int | None = None
    data_root: str | None = None
    num_fewshot: int = 0
    seed: int = 0
    documents: str = "sample"

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or not all(isinstance(n, str) for n in self.names):
            raise UnknownNameError("list of tasks", self.names, ['("rap_choice", "rap_recall")'])
        object.__setattr__(self, "names", tuple(self.names))
        if not self.names or len(set(self.names)) < len(self.names):
            raise InvalidRequestError(
                f"names must hold one task at least and none twice, not {list(self.names)}."
            )
        for name in self.names:
            check_generated_name(name)
        check_name("choice of documents", self.documents, DOCUMENTS)
        if self.data_root is not None:
            object.__setattr__(self, "data_root", str(self.data_root))
        check_types(self, least={"limit": 1, "num_fewshot": 0, "seed": 0})


@dataclass(frozen=True)
class LoadedTask:
    """A task or group as the user named it.

    Attributes:
        name: The name.
        tasks: lm-eval's task objects: a single one, or the members of the group.
        group: lm-eval's group object, or None.
    """

    name: str
    tasks: tuple[Any, ...]
    group: Any = None


_quiet_lock = threading.RLock()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress lm-eval's log lines below errors, its progress bars and those of `datasets`.

    Templates are compiled once. Standard error is not touched. Threads take turns, so that the last
    one restores the settings.
    """
    import datasets
    import lm_eval.api.task as lm_eval_task
    from lm_eval.utils import env

    with _quiet_lock, contextlib.ExitStack() as restore:
        for logger in map(logging.getLogger, _NOISY):
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        if not datasets.are_progress_bars_disabled():
            restore.callback(datasets.enable_progress_bars)
            datasets.disable_progress_bars()
        restore.callback(setattr, lm_eval_task, "tqdm", lm_eval_task.tqdm)
        lm_eval_task.tqdm = functools.partial(lm_eval_task.tqdm, disable=True)
        if "from_string" not in vars(env):  # the outermost block restores it
            restore.callback(vars(env).pop, "from_string")
            env.from_string = _compiled
        yield


@functools.lru_cache(maxsize=1024)
def _compiled(template: str) -> Any:
    """A template as lm-eval compiles it, which it would do again for each document."""
    from lm_eval.utils import env

    return type(env).from_string(env, template)


def load_task(name: str, config: TaskConfig, tokenizer: Any = None) -> LoadedTask:
    """Load one of a config's tasks: a generated one, or a task, group or tag of lm-eval.

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
        inline = long_context.lm_eval_config(tokenizer, config.seed, count)
        tasks, group = [ConfigurableTask(config=inline)], None
    elif name in GENERATED_TASKS:
        inline = GENERATED_TASKS[name].lm_eval_config(config.seed)
        tasks, group = [ConfigurableTask(config=inline)], None
    else:
        tasks, group = _load_named(name, config.data_root)
    for task in tasks:
        _check_output(name, task.OUTPUT_TYPE)
        # A 0 in the task's own config stays 0, as in lm-eval's evaluator.
        if task.get_config("num_fewshot") != 0:
            task.set_config(key="num_fewshot", value=config.num_fewshot)
        task.set_fewshot_seed(seed=config.seed)
    return LoadedTask(name, tuple(tasks), group)


def is_generated(name: str) -> bool:
    """Whether a task's documents are generated."""
    return name in GENERATED_TASKS or long_context_task(name) is not None


def check_scorable(names: Iterable[str]) -> None:
    """Check tasks before a model or a data set is loaded.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        UnknownNameError: There is no such task, or its config says that it is not scored by
            likelihoods.
    """
    require_extra("eval", "Scoring tasks")
    with quiet():
        for name in names:
            if not is_generated(name):
                _manager_for(name)


def check_generated_name(name: str) -> None:
    """Raise an error if a name begins with ``rap_``, as no task of lm-eval does, and is unknown."""
    if name.startswith("rap_") and not is_generated(name):
        known = [*KNOWN_TASKS, *(f"rap_{kind}_1024" for kind in LONG_CONTEXT_KINDS)]
        raise UnknownNameError("task", name, known, _ANY_OTHER)


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
        near = difflib.get_close_matches(name, manager.all_tasks, n=4, cutoff=0.7)
        hint = f"lm-eval also has {', '.join(map(repr, near))}." if near else _ANY_OTHER
        raise UnknownNameError("task", name, KNOWN_TASKS, hint)
    with contextlib.suppress(CorpusError):  # a group that changes its members' configs
        for leaf in _leaves(index, name):
            output = (index[leaf].cfg or {}).get("output_type")
            if output is not None:
                _check_output(name, output)
    return manager


def _load_named(name: str, data_root: str | None) -> tuple[list[Any], Any]:
    """A task of lm-eval, or the tasks of a group or tag with the group's own aggregation.

    Members of an inline group may override settings of the task that they name; this is
    lm-eval's way to change the data of a task.
    """
    manager = _manager_for(name)
    index = manager.task_index
    wanted: list[Any] = [name]
    try:
        members = [{"task": leaf} for leaf in _leaves(index, name)]
        wanted = [{"group": name, "task": members}]
    except CorpusError:  # a group that changes its members' configs
        if data_root is not None:
            raise
    if data_root is not None:
        for member in members:
            member |= local_overrides(data_root, member["task"], index[member["task"]].cfg)
    try:
        tasks = list(manager.load(wanted)["tasks"].values())
    except Exception as error:  # of the hub's client, or of a task's own templates and functions
        if data_root is not None:
            raise CorpusError(
                f"The files of the task {name!r} in {data_root} do not match what it reads: "
                f"{_brief(error)}. Compare their fields with the task's config in lm-eval."
            ) from error
        raise CorpusError(
            f"Cannot load the data of the task {name!r} from the hub ({_brief(error)}); check "
            "the network, set data_root to a folder with the task's data, or use the generated "
            f"tasks {', '.join(GENERATED_TASKS)}."
        ) from error
    own = index[name].cfg or {}
    return tasks, _group(name, own, tasks) if "group" in own else None


def _group(name: str, config: Mapping[str, Any], tasks: Iterable[Any]) -> Any:
    """lm-eval's group object with the group's own aggregation."""
    from lm_eval.api.group import Group
    from lm_eval.config.group import GroupConfig

    rule = config.get("aggregate_metric_list")
    group = Group.from_config(GroupConfig(group=name, aggregate_metric_list=rule))
    for task in tasks:
        group.add(task)
    return group


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


def _check_output(name: str, output_type: str) -> None:
    if output_type not in SCORABLE_OUTPUTS:
        hint = f"It is scored by {output_type}; only {', '.join(SCORABLE_OUTPUTS)} can be."
        raise UnknownNameError("likelihood task", name, KNOWN_TASKS, hint)


def _brief(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:200]}".removesuffix(".")
