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
from rap_env.scoring.lm_eval_tasks import LoadedTask, TaskConfig, is_generated
from rap_env.scoring.long_context_tasks import long_context_task

_FILTER = "none"  # lm-eval's name for the default filter

Outputs = npt.NDArray[np.float64]
"""Log-likelihood (nats) and greedy flag of each of a task's instances, shape (instances, 2)."""


@dataclass(frozen=True, eq=False)
class TaskResult:
    """The result of one task or group under a mask.

    Attributes:
        name: The task.
        metrics: lm-eval's metrics by name, such as ``acc``, ``acc_norm``, ``word_perplexity``.
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
        encoded = encoder.encode(task)
        # A rolling instance is the sum of its windows; any other instance is one request.
        self._owner = np.repeat(np.arange(len(encoded)), [len(parts) for parts in encoded])
        requests = [request for parts in encoded for request in parts]
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
        values = self._scorer.run()
        outputs = np.zeros((self._owner[-1] + 1, 2))
        np.add.at(outputs[:, 0], self._owner, values[:, 0])
        outputs[:, 1] = 1.0
        np.minimum.at(outputs[:, 1], self._owner, values[:, 1])
        return outputs

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
        rolling = self.task.OUTPUT_TYPE == "loglikelihood_rolling"
        for instance, (likelihood, greedy) in zip(self.task.instances, outputs, strict=True):
            answer = float(likelihood) if rolling else (float(likelihood), bool(greedy))
            instance.resps, instance.filtered_resps = [answer], {}
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


def combine(loaded: LoadedTask, parts: Sequence[TaskResult]) -> TaskResult:
    """The result of a task, or of a group by lm-eval's aggregation for it (else plain means)."""
    if loaded.group is None and len(parts) == 1:
        return parts[0]
    rows = {
        part.name: {
            **{f"{metric},{_FILTER}": value for metric, value in part.metrics.items()},
            **{f"{metric}_stderr,{_FILTER}": value for metric, value in part.stderr.items()},
            "sample_len": part.documents,
        }
        for part in parts
    }
    shared = [m for m in parts[0].metrics if all(m in part.metrics for part in parts)]
    metrics = {m: statistics.fmean(part.metrics[m] for part in parts) for m in shared}
    stderr: dict[str, float] = {}
    for part_metric in shared:
        errors = [part.stderr.get(part_metric, math.nan) for part in parts]
        if not any(map(math.isnan, errors)):
            stderr[part_metric] = math.hypot(*errors) / len(errors)
    if loaded.group is not None:
        whole = loaded.group.aggregate(rows)
        for metric in shared:
            metrics[metric] = float(whole.get(f"{metric},{_FILTER}", metrics[metric]))
            error = whole.get(f"{metric}_stderr,{_FILTER}")
            if isinstance(error, float):
                stderr[metric] = error
    kept = [m for m in shared if all(m in part.per_document for part in parts)]
    per_document = {m: np.concatenate([part.per_document[m] for part in parts]) for m in kept}
    documents = sum(part.documents for part in parts)
    choice_nll = np.concatenate([part.choice_nll for part in parts])
    return TaskResult(loaded.name, metrics, stderr, documents, per_document, choice_nll)


def _documents_hash(documents: Mapping[int, Sequence[Any]]) -> str:
    """SHA-256 of the scored documents."""
    total = hashlib.sha256()
    for number, parts in documents.items():
        total.update(f"{number} {parts[0].doc!r}\n".encode())
    return total.hexdigest()
