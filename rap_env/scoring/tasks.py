"""Scores plans on lm-eval tasks: requests are built once, then only the model runs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import math
import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from rap_env.artifacts import canonical_json
from rap_env.errors import CorpusError, UnknownNameError
from rap_env.extras import require_extra
from rap_env.memory import MemoryModel
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.scoring import lm_eval_tasks
from rap_env.scoring.lm_eval_tasks import TaskConfig, is_generated
from rap_env.scoring.long_context_tasks import check_fits, long_context_task
from rap_env.scoring.scorer import model_context
from rap_env.scoring.store import ScoreStore

if TYPE_CHECKING:  # lm-eval is an extra
    from rap_env.scoring.plan_lm import Batch, PlanLM

log = logging.getLogger(__name__)

_METRIC = "loglikelihoods"
_MULTIPLE_CHOICE = [name for name in lm_eval_tasks.KNOWN_TASKS if name != "lambada_openai"]

Outputs = npt.NDArray[np.float64]
"""Log-likelihood (nats) and greedy flag of each of a task's requests, shape (requests, 2)."""


class TaskResult(NamedTuple):
    """The result of one task under a plan.

    Attributes:
        metrics: lm-eval's metrics by name, such as ``acc`` and ``acc_norm``.
        documents: Number of documents.
        per_document: ``acc`` and ``acc_norm`` of each document, where the task has them,
            shape (documents,), in the same order for every plan, so that two plans can be
            compared in pairs.
        choice_nll: For tasks with choices: minus the log of the probability that the right
            choice has among the choices of each document, nats, (documents,), else empty. It
            is log(choices) for a guess, and tells apart what the accuracy of few documents
            does not.
    """

    metrics: dict[str, float]
    documents: int
    per_document: dict[str, npt.NDArray[np.float64]]
    choice_nll: npt.NDArray[np.float64]


class TaskScorer:
    """Measures the model's scores on lm-eval tasks under plans.

    The tasks' own code computes every metric from the log-likelihoods of their requests. Only
    these likelihoods are computed by `PlanLM` and kept in the store.

    Args:
        llm: The live model; its plan is restored after each call.
        config: Which tasks.
        store: Keeps likelihoods between runs; None keeps results in this object only.

    Attributes:
        evaluations: Plans for which the model ran; those found in the store do not count.
        chance: Accuracy of guessing, by task: mean of 1 / choices, 0 for open answers.
        context: Everything that determines the likelihoods; published rows are keyed by it.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        UnknownNameError: There is no such task.
        CorpusError: A task's data is missing or does not match, or the model has no
            tokenizer.
    """

    def __init__(
        self, llm: ElasticLLM, config: TaskConfig, store: ScoreStore | None = None
    ) -> None:
        require_extra("eval", "Scoring tasks")
        from rap_env.scoring import plan_lm

        self.llm = llm
        self.config = config
        self.store = store
        self.evaluations = 0
        self._lm = plan_lm.PlanLM(llm)
        for task in filter(None, map(long_context_task, config.names)):
            check_fits(task, self._lm.max_length, llm.name)
        with lm_eval_tasks.quiet():
            names = dict.fromkeys(lm_eval_tasks.members(config.names))
            loaded = {n: lm_eval_tasks.load_task(n, config, llm.tokenizer) for n in names}
            self._tasks = {name: _built(loaded[name], self._lm, config) for name in names}
        self.chance = {name: task.chance for name, task in self._tasks.items()}
        self._results: dict[Plan, dict[str, TaskResult]] = {}
        common = {
            **model_context(llm),
            "batch": [plan_lm.BATCH_ROWS, plan_lm.BATCH_TOKENS, plan_lm.HEAD_TOKENS],
            "lm_eval": importlib.metadata.version("lm_eval"),
        }
        contexts = {name: task.context for name, task in self._tasks.items()}
        self.context: Mapping[str, Any] = {**common, "tasks": contexts}
        self._contexts = {name: {**common, "task": own} for name, own in contexts.items()}

    def accuracies(self, plan: Plan, metric: str = "acc") -> dict[str, float]:
        """Accuracy by task under a plan, each in [0, 1].

        Tasks without it are left out; `results` has all their metrics.

        Args:
            plan: The plan.
            metric: ``acc``, or ``acc_norm``: with the likelihood of each choice divided by
                its length in bytes, for tasks whose choices are whole answers.

        Raises:
            UnknownNameError: The plan names items or levels that the model does not have.
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        results = self.results(plan)
        return {n: r.metrics[metric] for n, r in results.items() if metric in r.metrics}

    def right_answers(self, plan: Plan) -> dict[str, npt.NDArray[np.float64]]:
        """Which documents are answered right under a plan: 1 or 0 for each, (documents,), by task.

        By ``acc_norm`` where lm-eval has it for the task, else by ``acc``; tasks with neither
        are left out. The errors are those of `accuracies`.
        """
        answers = {name: result.per_document for name, result in self.results(plan).items()}
        return {
            name: values.get("acc_norm", values["acc"])
            for name, values in answers.items()
            if "acc" in values
        }

    def flipped_answers_share(self, plan: Plan) -> float | None:
        """Share of multiple-choice answers that are right under a plan and wrong natively, or back.

        Over the documents of all tasks; None without multiple-choice tasks. Source: the flips
        of Dutta et al. (2024), Accuracy is Not All You Need. The errors are those of
        `accuracies`.
        """
        native = self.right_answers(Plan())
        flipped = [
            right != native[name]
            for name, right in self.right_answers(plan).items()
            if self.chance[name]
        ]
        return float(np.concatenate(flipped).mean()) if flipped else None

    @cached_property
    def above_chance(self) -> tuple[str, ...]:
        """Tasks in which the native model is better than a guess by three standard errors or more.

        In the others the share of it that a plan keeps is noise.
        """
        margins = {
            name: (right.mean() - self.chance[name], right.std() / math.sqrt(len(right)))
            for name, right in self.right_answers(Plan()).items()
        }
        above = tuple(n for n, (margin, error) in margins.items() if margin > 3 * error)
        if left_out := sorted(margins.keys() - above):
            log.warning("The native model is not above chance in %s.", ", ".join(left_out))
        return above

    def mean_accuracy(self, plan: Plan) -> float:
        """Mean of the tasks' accuracies under a plan.

        Raises:
            UnknownNameError: None of the tasks has an accuracy.
        """
        accuracies = self.accuracies(plan)
        if not accuracies:
            names = ", ".join(self.config.names)
            raise UnknownNameError("accuracy task", names, lm_eval_tasks.KNOWN_TASKS)
        return statistics.fmean(accuracies.values())

    def mean_choice_nll(self, plan: Plan) -> float:
        """Mean over the tasks of `TaskResult.choice_nll` under a plan, in nats.

        Raises:
            UnknownNameError: One of the tasks has no choices.
        """
        per_task = {name: result.choice_nll for name, result in self.results(plan).items()}
        for name, nll in per_task.items():
            if not len(nll):
                raise UnknownNameError("multiple-choice task", name, _MULTIPLE_CHOICE)
        return statistics.fmean(float(nll.mean()) for nll in per_task.values())

    def results(self, plan: Plan) -> dict[str, TaskResult]:
        """Metrics and results of documents by task under a plan.

        The errors are those of `accuracies`.
        """
        if plan not in self._results:
            MemoryModel(self.llm).check_plan(plan)
            outputs = self._outputs(plan)
            with lm_eval_tasks.quiet():
                self._results[plan] = {
                    name: _result(task, outputs[name]) for name, task in self._tasks.items()
                }
        return dict(self._results[plan])

    def _outputs(self, plan: Plan) -> dict[str, Outputs]:
        """Likelihoods by task, from the store or the model."""
        outputs: dict[str, Outputs] = {}
        ran = False
        for name, task in self._tasks.items():
            context = self._contexts[name]
            values = None if self.store is None else self.store.get(context, plan, _METRIC)
            if values is not None:
                outputs[name] = np.array(values).reshape(-1, 2)
                continue
            ran, outputs[name] = True, self._lm.run(task.batches, plan)
            if self.store is not None:
                self.store.put(context, plan, _METRIC, outputs[name].ravel().tolist())
        self.evaluations += ran
        return outputs


class _BuiltTask(NamedTuple):
    """A task of lm-eval with its requests, built once for all plans.

    Attributes:
        task: lm-eval's task.
        documents: The requests of each document.
        batches: The forward passes that answer them.
        context: Everything but the model that determines their likelihoods.
        chance: Accuracy of guessing.
    """

    task: Any
    documents: Sequence[Sequence[Any]]
    batches: Sequence[Batch]
    context: Mapping[str, Any]
    chance: float


def _built(task: Any, lm: PlanLM, config: TaskConfig) -> _BuiltTask:
    """Build the requests of a task, for all documents or as many as the config says.

    Raises:
        CorpusError: A document does not match what the task reads.
    """
    # Questions about one long text are answered by one pass over it.
    shared = long_context_task(task.task_name) is not None
    limit, chosen = config.limit, None
    try:
        if limit is not None and not is_generated(task.task_name):
            chosen = _sampled(len(task.eval_docs), limit, config.seed)
        task.build_all_requests(limit=limit, rank=0, world_size=1, samples=chosen)
        requests = lm.encode(task.instances)
        batches = lm.batches(requests, share_prefixes=shared)
    except Exception as error:  # a task's own templates may raise anything on bad rows
        raise CorpusError(
            f"The documents of the task {task.task_name!r} do not match what it reads: "
            f"{type(error).__name__}: {str(error).removesuffix('.')}."
        ) from error
    documents: dict[int, list[Any]] = {}
    for instance in task.instances:
        documents.setdefault(instance.doc_id, []).append(instance)
    read = "".join(f"{number} {parts[0].doc!r}\n" for number, parts in documents.items())
    context = {
        "name": task.task_name,
        "version": str(task.VERSION),
        "documents": len(documents),
        "limit": limit,
        "num_fewshot": task.get_config("num_fewshot"),
        "seed": config.seed,
        "max_length": int(lm.max_length),
        "documents_sha256": _sha256(read),
        "requests_sha256": _sha256(canonical_json(requests)),
        **({"shared_prefixes": True} if shared else {}),
    }
    chance = 0.0
    if task.OUTPUT_TYPE == "multiple_choice":
        chance = statistics.fmean(1 / len(parts) for parts in documents.values())
    return _BuiltTask(task, list(documents.values()), batches, context, chance)


def _sampled(documents: int, limit: int, seed: int) -> list[int] | None:
    """Numbers of `limit` of the documents, ascending; None if there are no more than that.

    A larger limit with the same seed keeps the documents of a smaller one.
    """
    if limit >= documents:
        return None
    return sorted(np.random.default_rng(seed).permutation(documents)[:limit].tolist())


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _result(built: _BuiltTask, outputs: Outputs) -> TaskResult:
    """The task's own metrics from the likelihoods of its requests."""
    task, values = built.task, dict[str, list[Any]]()
    for instance, (likelihood, greedy) in zip(task.instances, outputs, strict=True):
        instance.resps, instance.filtered_resps = [(float(likelihood), bool(greedy))], {}
    task.apply_filters()
    for instances in built.documents:
        parts = sorted(instances, key=lambda part: part.idx)
        chosen = next(iter(parts[0].filtered_resps))
        answers = [part.filtered_resps[chosen] for part in parts]
        for name, value in task.process_results(parts[0].doc, answers).items():
            values.setdefault(name, []).append(value)
    return TaskResult(
        {name: float(task.aggregation()[name](numbers)) for name, numbers in values.items()},
        len(built.documents),
        {n: np.array(values[n], dtype=float) for n in ("acc", "acc_norm") if n in values},
        _choice_nll(built, outputs) if built.chance else np.zeros(0),
    )


def _choice_nll(built: _BuiltTask, outputs: Outputs) -> npt.NDArray[np.float64]:
    """`TaskResult.choice_nll` from the likelihoods of the task's requests."""
    task, first, values = built.task, 0, []
    for instances in built.documents:
        doc = instances[0].doc
        choices = task.doc_to_choice(doc)
        logs = outputs[first : first + len(choices), 0]
        first += len(instances)
        # The right choices, read as lm-eval reads them.
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        answers = gold if isinstance(gold, list) else [gold]
        numbers = [choices.index(g) if g in choices else int(g) for g in answers]
        right = logs[[n for n in numbers if 0 <= n < len(logs)]]
        nll = np.logaddexp.reduce(logs) - np.logaddexp.reduce(right)
        values.append(nll if len(right) else math.nan)
    return np.array(values)
