"""The requests of one task, and the task's own metrics from their likelihoods."""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from rap_env.artifacts import canonical_json
from rap_env.errors import CorpusError
from rap_env.models.live.elastic import ElasticLLM
from rap_env.scoring.likelihoods import ContinuationScorer, RequestEncoder
from rap_env.scoring.lm_eval_tasks import TaskConfig, is_generated
from rap_env.scoring.long_context_tasks import long_context_task

Outputs = npt.NDArray[np.float64]
"""Log-likelihood (nats) and greedy flag of each of a task's instances, shape (instances, 2)."""


@dataclass(frozen=True, eq=False)
class TaskResult:
    """The result of one task under a mask.

    Attributes:
        name: The task.
        metrics: lm-eval's metrics by name, such as ``acc`` and ``acc_norm``.
        stderr: Standard errors of the metrics that are means.
        documents: Number of documents.
        per_document: For metrics with one number per document: these numbers, shape
            (documents,), in the same order for every mask, so that two masks can be compared in
            pairs.
        choice_nll: For tasks with choices: minus the log of the probability that the right choice
            has among the choices of each document, nats, (documents,), else empty. It is
            log(choices) for a guess, and tells apart what the accuracy of few documents does not.
    """

    name: str
    metrics: dict[str, float]
    stderr: dict[str, float]
    documents: int
    per_document: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    choice_nll: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))


class TaskRequests:
    """One lm-eval task with its requests built and encoded, once for all masks.

    It has all documents, or as many as the config says: the first ones, or a sample. A generated
    task has the first ones.

    Attributes:
        context: Everything but the model that determines the task's likelihoods.

    Raises:
        CorpusError: A document does not match what the task reads.
    """

    def __init__(
        self, llm: ElasticLLM, task: Any, encoder: RequestEncoder, config: TaskConfig
    ) -> None:
        self.task = task
        limit, sample = config.limit, config.documents == "sample"
        try:
            chosen = None
            if sample and limit is not None and not is_generated(task.task_name):
                chosen = sampled(len(task.eval_docs), limit, config.seed)
            task.build_all_requests(limit=limit, rank=0, world_size=1, samples=chosen)
        except Exception as error:  # a task's own templates may raise anything on bad rows
            raise CorpusError(
                f"The documents of the task {task.task_name!r} do not match what it reads: "
                f"{type(error).__name__}: {error}."
            ) from error
        requests = encoder.encode(task)
        # Questions about one long text are answered by one pass over it.
        shared = long_context_task(task.task_name) is not None
        self._scorer = ContinuationScorer(llm, requests, encoder.max_length, share_prefixes=shared)
        self._documents: dict[int, list[Any]] = {}
        for instance in task.instances:
            self._documents.setdefault(instance.doc_id, []).append(instance)
        self.context: dict[str, Any] = {
            "name": task.task_name,
            "version": str(task.VERSION),
            "documents": len(self._documents),
            "limit": limit,
            "num_fewshot": task.get_config("num_fewshot"),
            "seed": config.seed,
            "max_length": encoder.max_length,
            "documents_sha256": _documents_hash(self._documents),
            "requests_sha256": hashlib.sha256(canonical_json(requests).encode()).hexdigest(),
            **({"shared_prefixes": True} if shared else {}),
        }

    @property
    def chance(self) -> float:
        """Mean of 1 / choices; 0 for an open answer."""
        if self.task.OUTPUT_TYPE != "multiple_choice":
            return 0.0
        return statistics.fmean(1 / len(parts) for parts in self._documents.values())

    def run(self) -> Outputs:
        """Likelihoods of all instances under the mask that is applied."""
        return self._scorer.run()

    def result(self, outputs: Outputs) -> TaskResult:
        """Compute the task's own metrics from the likelihoods of its instances."""
        from lm_eval.api.metrics import mean, mean_stderr

        values = self._document_values(outputs)
        metrics, stderr, per_document = {}, {}, {}
        for name, numbers in values.items():
            aggregate = self.task.aggregation()[name]
            metrics[name] = float(aggregate(numbers))
            if all(isinstance(n, int | float) for n in numbers):
                per_document[name] = np.array(numbers, dtype=float)
            if aggregate is mean and len(numbers) > 1:
                stderr[name] = float(mean_stderr(numbers))
        return TaskResult(
            self.task.task_name,
            metrics,
            stderr,
            len(self._documents),
            per_document,
            self._choice_nll(outputs),
        )

    def _choice_nll(self, outputs: Outputs) -> npt.NDArray[np.float64]:
        """`TaskResult.choice_nll` from the likelihoods of the task's instances."""
        if self.task.OUTPUT_TYPE != "multiple_choice":
            return np.zeros(0)
        first, values = 0, []
        for instances in self._documents.values():
            doc = instances[0].doc
            logs = outputs[first : first + len(self.task.doc_to_choice(doc)), 0]
            first += len(instances)
            right = [n for n in _right_choices(self.task, doc) if 0 <= n < len(logs)]
            values.append(_log_sum(logs) - _log_sum(logs[right]) if right else math.nan)
        return np.array(values)

    def _document_values(self, outputs: Outputs) -> dict[str, list[Any]]:
        """The task's value for each document, by metric."""
        for instance, (likelihood, greedy) in zip(self.task.instances, outputs, strict=True):
            instance.resps, instance.filtered_resps = [(float(likelihood), bool(greedy))], {}
        self.task.apply_filters()
        values: dict[str, list[Any]] = {}
        for instances in self._documents.values():
            parts = sorted(instances, key=lambda part: part.idx)
            chosen = next(iter(parts[0].filtered_resps))
            answers = [part.filtered_resps[chosen] for part in parts]
            for name, value in self.task.process_results(parts[0].doc, answers).items():
                values.setdefault(name, []).append(value)
        return values


def sampled(documents: int, limit: int, seed: int) -> list[int] | None:
    """Numbers of `limit` of the documents, ascending; None if there are no more than that.

    A larger limit with the same seed keeps the documents of a smaller one.
    """
    if limit >= documents:
        return None
    return sorted(np.random.default_rng(seed).permutation(documents)[:limit].tolist())


def _right_choices(task: Any, doc: Any) -> list[int]:
    """Numbers of the right choices of a document, read as lm-eval reads them."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    choices = task.doc_to_choice(doc)
    answers = gold if isinstance(gold, list) else [gold]
    return [choices.index(g) if isinstance(g, str) and g in choices else int(g) for g in answers]


def _log_sum(logs: npt.NDArray[np.float64]) -> float:
    """The log of the sum of the exponentials."""
    return float(np.logaddexp.reduce(logs))


def _documents_hash(documents: Mapping[int, Sequence[Any]]) -> str:
    """SHA-256 of the scored documents."""
    total = hashlib.sha256()
    for number, parts in documents.items():
        total.update(f"{number} {parts[0].doc!r}\n".encode())
    return total.hexdigest()
