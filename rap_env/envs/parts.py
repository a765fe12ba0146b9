"""Plain words and dicts into the live parts of an environment."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from rap_env.errors import InvalidRequestError, UnknownNameError
from rap_env.memory import MemoryModel
from rap_env.request import Request
from rap_env.reward import MeasuresAccuracy
from rap_env.specs import check_settings

if TYPE_CHECKING:
    from rap_env.context.base import PruningContext

INFEASIBLE = ("error", "clip")
"""What to do with a budget that no mask can meet: refuse it, or raise it to the least one."""

TASK_DOCUMENTS = 20
"""Documents of each task in an accuracy reward: 3 tasks of 20 take seconds a mask on a CPU."""

_task_scorers: WeakKeyDictionary[PruningContext, dict[Any, MeasuresAccuracy]] = WeakKeyDictionary()


def open_env_context(
    calibration: str | Mapping[str, Any] | None, **settings: Any
) -> PruningContext:
    """The context of an environment, shared with all of the process that measure the same.

    Args:
        calibration: Source of the text, dict of `CorpusConfig` settings, or None.
        settings: Of `ContextConfig`.

    Raises:
        UnknownNameError: The calibration has no such setting.
        RapError: As loading the model, the text, the store or an artifact does.
    """
    from rap_env.context.base import ContextConfig
    from rap_env.context.opening import open_context
    from rap_env.scoring.corpus import CorpusConfig

    corpus = {"source": calibration} if isinstance(calibration, str) else dict(calibration or {})
    check_settings(corpus, "the calibration", [entry.name for entry in fields(CorpusConfig)])
    return open_context(ContextConfig(calibration=CorpusConfig(**corpus), **settings))


def task_scorer(
    context: PruningContext, tasks: Sequence[str] | Mapping[str, Any] | None
) -> MeasuresAccuracy:
    """What measures task accuracies on a context; one for each set of tasks.

    Args:
        context: The model and the score store.
        tasks: Names of tasks, dict of `TaskConfig` settings, or None for the generated ones.
            Without a ``limit``, `TASK_DOCUMENTS` documents of each are used.

    Raises:
        UnknownNameError: There is no such task or setting.
        InvalidRequestError: A setting is out of its range.
        MissingDependencyError: lm-eval is not installed.
    """
    from rap_env.scoring.generated_tasks import GENERATED_TASKS
    from rap_env.scoring.tasks import TaskConfig, TaskScorer

    given = dict(tasks) if isinstance(tasks, Mapping) else {"names": tasks} if tasks else {}
    check_settings(given, "the tasks", [entry.name for entry in fields(TaskConfig)])
    settings = {"names": tuple(GENERATED_TASKS), "limit": TASK_DOCUMENTS, **given}
    if not isinstance(settings["names"], str):
        settings["names"] = tuple(settings["names"])
    config = TaskConfig(**settings)
    made = _task_scorers.setdefault(context, {})
    if config not in made:  # building the requests of a task takes seconds
        made[config] = TaskScorer(context.llm, config, store=context.store)
    return made[config]


def request_of(given: Request | Mapping[str, Any], memory: MemoryModel) -> Request:
    """A request from what a user passed to ``reset``.

    Args:
        given: A `Request`, or a dict of ``batch_size``, ``seq_len_tokens`` and one of
            ``budget_bytes`` and ``budget_fraction``.
        memory: The model's byte arithmetic.

    Raises:
        InvalidRequestError: The request does not suit the model, or a value is missing.
        UnknownNameError: The dict has another key.
    """
    if isinstance(given, Request):
        memory.check(given.batch_size, given.seq_len_tokens)
        return given
    if not isinstance(given, Mapping):
        raise InvalidRequestError(f"A request must be a Request or a dict, not {given!r}.")
    shape, budgets = ("batch_size", "seq_len_tokens"), ("budget_bytes", "budget_fraction")
    check_settings(given, "a request", shape + budgets)
    if not all(key in given for key in shape) or sum(key in given for key in budgets) != 1:
        raise InvalidRequestError(
            "A request needs batch_size, seq_len_tokens and one of budget_bytes and "
            f"budget_fraction, not {sorted(given)}."
        )
    batch_size, seq_len_tokens = (given[key] for key in shape)
    # Checks that both are whole numbers, before any arithmetic is done with them.
    request = Request(batch_size, seq_len_tokens, given.get("budget_bytes", 1))
    memory.check(batch_size, seq_len_tokens)
    if "budget_fraction" in given:
        return Request.at_fraction(memory, batch_size, seq_len_tokens, given["budget_fraction"])
    return request


def check_choices(infeasible: str, penalty: float, max_invalid: int) -> None:
    """Refuse settings of an environment that make no sense.

    Raises:
        UnknownNameError: There is no such way with infeasible budgets.
        InvalidRequestError: The penalty or the number of invalid actions is out of its range.
    """
    if infeasible not in INFEASIBLE:
        raise UnknownNameError("setting of infeasible:", infeasible, INFEASIBLE)
    if not 0 <= penalty < float("inf"):
        raise InvalidRequestError(f"invalid_action_penalty must be 0 or above, not {penalty!r}.")
    if isinstance(max_invalid, bool) or int(max_invalid) != max_invalid or max_invalid < 1:
        raise InvalidRequestError(
            f"max_invalid_actions must be a whole number of at least 1, not {max_invalid!r}."
        )


def check_render_mode(render_mode: str | None, known: Sequence[str]) -> str | None:
    """The render mode itself, if there is such a one.

    Raises:
        UnknownNameError: There is not.
    """
    if render_mode is not None and render_mode not in known:
        raise UnknownNameError("render mode", render_mode, known)
    return render_mode
