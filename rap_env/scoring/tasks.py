"""lm-eval accuracies of many masks: requests are built once, then only the model runs."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import transformers

from rap_env.artifacts import canonical_json
from rap_env.blocks import BlockMask
from rap_env.errors import (
    CorpusError,
    InvalidRequestError,
    NonFiniteScoreError,
    UnknownNameError,
)
from rap_env.llm.elastic import ElasticLLM
from rap_env.scoring import continuations, harness
from rap_env.scoring.scorer import _device_kind
from rap_env.scoring.store import ScoreStore, context_key

_METRIC = "loglikelihoods"
_FILTER = "none"  # the filter that lm-eval gives to tasks without one of their own

Outputs = npt.NDArray[np.float64]
"""Log-likelihood (nats) and greedy flag of each of a task's instances, shape (instances, 2)."""


@dataclass(frozen=True)
class TaskConfig:
    """Which tasks, on how many documents.

    Attributes:
        names: Generated tasks (``rap_minimal_pairs``, ``rap_recall``, ``rap_choice``) or any
            task or group of lm-eval that is scored by likelihoods.
        limit: First so many documents of each task (of each member of a group); None for all.
        data_root: Folder of local data for lm-eval's own tasks, see
            `rap_env.scoring.local_data`; None takes the hub's.
        num_fewshot: Solved examples put before each question.
        seed: Chooses the documents of generated tasks and the few-shot examples.

    Raises:
        UnknownNameError: A name is no string, or a misspelt generated task.
        InvalidRequestError: A number is out of range, or there are no names, or one is twice.
    """

    names: tuple[str, ...]
    limit: int | None = None
    data_root: str | None = None
    num_fewshot: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.names, str) or not all(isinstance(n, str) for n in self.names):
            raise UnknownNameError("list of tasks", self.names, ['("rap_choice", "rap_recall")'])
        object.__setattr__(self, "names", tuple(self.names))
        if not self.names or len(set(self.names)) < len(self.names):
            raise InvalidRequestError(
                f"names must hold one task at least and none twice, not {list(self.names)}."
            )
        for name in self.names:
            harness.check_generated_name(name)
        if self.data_root is not None:
            object.__setattr__(self, "data_root", str(self.data_root))
        for setting, least in (("limit", 1), ("num_fewshot", 0), ("seed", 0)):
            value = getattr(self, setting)
            if setting == "limit" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InvalidRequestError(
                    f"{setting} must be a whole number >= {least}, not {value!r}."
                )


@dataclass(frozen=True, eq=False)
class TaskResult:
    """What one task, or one group, gave for a mask.

    Attributes:
        name: The task.
        metrics: lm-eval's metrics by name, such as ``acc``, ``acc_norm``, ``word_perplexity``.
        stderr: Standard errors of those that are means.
        documents: How many documents they rest on.
        per_document: For metrics with one number a document: that number, shape (documents,),
            in the same order for every mask, so that two masks can be compared in pairs.
    """

    name: str
    metrics: dict[str, float]
    stderr: dict[str, float]
    documents: int
    per_document: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)

    @property
    def main_metric(self) -> str:
        """``acc`` where there is one, else the first that the task lists."""
        return "acc" if "acc" in self.metrics else next(iter(self.metrics))


class TaskScorer:
    """Measures what masks do to the model's scores on lm-eval tasks.

    Every number is made by the tasks' own code from the log-likelihoods of their requests;
    only those likelihoods are computed here, and kept in the store.

    Args:
        llm: The live model; its mask is restored after each call.
        config: Which tasks.
        store: Where likelihoods are kept between runs; None keeps results in this object only.
        progress: Show a bar for each task while the model runs.

    Attributes:
        evaluations: Masks for which the model was really run (stored ones don't count).

    Raises:
        MissingDependencyError: lm-eval is not installed.
        UnknownNameError: There is no such task.
        CorpusError: A task's data is missing, does not fit, or the model has no tokenizer.
    """

    def __init__(
        self,
        llm: ElasticLLM,
        config: TaskConfig,
        store: ScoreStore | None = None,
        *,
        progress: bool = False,
    ) -> None:
        harness.require_lm_eval()
        self.llm = llm
        self.config = config
        self.store = store
        self.evaluations = 0
        self._progress = progress
        self._loaded = [
            harness.load_task(
                name,
                data_root=config.data_root,
                seed=config.seed,
                num_fewshot=config.num_fewshot,
            )
            for name in config.names
        ]
        encoder = harness.RequestEncoder(llm)
        members = {task.task_name: task for loaded in self._loaded for task in loaded.tasks}
        self._members = {
            name: _Member(llm, task, encoder, config) for name, task in members.items()
        }
        self._results: dict[BlockMask, dict[str, TaskResult]] = {}
        common = self._common_context()
        self.context: Mapping[str, Any] = {
            **common,
            "tasks": {name: member.context for name, member in self._members.items()},
        }
        self._contexts = {
            name: {**common, "task": member.context} for name, member in self._members.items()
        }
        self._keys = {name: context_key(context) for name, context in self._contexts.items()}

    @property
    def dense_accuracies(self) -> dict[str, float]:
        """Accuracies of the dense model."""
        return self.accuracies(BlockMask())

    @cached_property
    def chance(self) -> dict[str, float]:
        """Accuracy of guessing, by task: mean of 1 / choices, 0 where the answer is open."""
        return {
            loaded.name: statistics.fmean(
                self._members[task.task_name].chance for task in loaded.tasks
            )
            for loaded in self._loaded
        }

    def accuracies(self, mask: BlockMask) -> dict[str, float]:
        """Accuracy by task under `mask`, each in [0, 1].

        Tasks without an accuracy (wikitext) are left out; `results` has their metrics.

        Raises:
            UnknownNameError: The mask names blocks that the model does not have.
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        results = self.results(mask)
        return {n: r.metrics["acc"] for n, r in results.items() if "acc" in r.metrics}

    def mean_accuracy(self, mask: BlockMask) -> float:
        """Mean of the tasks' accuracies under `mask`.

        Raises:
            UnknownNameError: None of the tasks has an accuracy.
        """
        accuracies = self.accuracies(mask)
        if not accuracies:
            known = [name for name in harness.KNOWN_TASKS if name != "wikitext"]
            raise UnknownNameError("accuracy task", ", ".join(self.config.names), known)
        return statistics.fmean(accuracies.values())

    def results(self, mask: BlockMask) -> dict[str, TaskResult]:
        """All metrics, standard errors and document counts by task under `mask`.

        Raises:
            UnknownNameError: The mask names blocks that the model does not have.
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        mask.check(self.llm.num_blocks)
        if mask not in self._results:
            outputs = self._outputs(mask)
            parts = {n: member.result(outputs[n]) for n, member in self._members.items()}
            self._results[mask] = {
                loaded.name: _combine(loaded, [parts[t.task_name] for t in loaded.tasks])
                for loaded in self._loaded
            }
        return dict(self._results[mask])

    def _outputs(self, mask: BlockMask) -> dict[str, Outputs]:
        """Likelihoods by member task, from the store or the model."""
        outputs = {name: self._look_up(name, mask) for name in self._members}
        missing = [name for name, found in outputs.items() if found is None]
        with self.llm.masked(mask):
            for name in missing:
                outputs[name] = self._measure(name, mask)
        self.evaluations += bool(missing)
        return {name: found for name, found in outputs.items() if found is not None}

    def _look_up(self, name: str, mask: BlockMask) -> Outputs | None:
        values = None if self.store is None else self.store.get(self._keys[name], mask, _METRIC)
        return None if values is None else np.array(values).reshape(-1, 2)

    def _measure(self, name: str, mask: BlockMask) -> Outputs:
        outputs = self._members[name].run(name if self._progress else None)
        if not np.isfinite(outputs).all():
            raise NonFiniteScoreError(
                f"{self.llm.name} ({self.llm.facts.dtype}) gave a non-finite likelihood on the "
                f"task {name!r} {mask}; check the weights, or load the model with "
                "dtype='float32'."
            )
        if self.store is not None:
            values = outputs.reshape(-1).tolist()
            self.store.put(self._keys[name], mask, _METRIC, values, self._contexts[name])
        return outputs

    def _common_context(self) -> dict[str, Any]:
        return {
            "model": self.llm.facts.fingerprint,
            "dtype": self.llm.facts.dtype,
            "device": _device_kind(self.llm.device),
            "attention": str(getattr(self.llm.model.config, "_attn_implementation", "")),
            "batch": [
                continuations.BATCH_ROWS,
                continuations.BATCH_TOKENS,
                continuations.HEAD_TOKENS,
            ],
            "threads": torch.get_num_threads() if self.llm.device.type == "cpu" else 0,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "lm_eval": importlib.metadata.version("lm_eval"),
        }


class _Member:
    """One lm-eval task with its requests built and encoded."""

    def __init__(
        self, llm: ElasticLLM, task: Any, encoder: harness.RequestEncoder, config: TaskConfig
    ) -> None:
        self.task = task
        with harness.quiet():
            try:
                task.build_all_requests(limit=config.limit, rank=0, world_size=1)
            except CorpusError:
                raise
            except Exception as error:  # whatever a task's own templates raise on bad rows
                raise CorpusError(
                    f"The documents of the task {task.task_name!r} do not fit what it reads: "
                    f"{type(error).__name__}: {error}."
                ) from error
            encoded = encoder.encode(task)
        # A rolling instance is the sum of its windows, any other is one request.
        self._owner = np.repeat(np.arange(len(encoded)), [len(parts) for parts in encoded])
        requests = [request for parts in encoded for request in parts]
        self._scorer = continuations.ContinuationScorer(llm, requests, encoder.max_length)
        self._documents: dict[int, list[Any]] = {}
        for instance in task.instances:
            self._documents.setdefault(instance.doc_id, []).append(instance)
        self.context = {
            "name": task.task_name,
            "version": str(task.VERSION),
            "documents": len(self._documents),
            "limit": config.limit,
            "num_fewshot": task.get_config("num_fewshot"),
            "seed": config.seed,
            "max_length": encoder.max_length,
            "documents_sha256": _documents_hash(self._documents),
            "requests_sha256": hashlib.sha256(canonical_json(requests).encode()).hexdigest(),
        }

    @property
    def chance(self) -> float:
        """Mean of 1 / choices; 0 for an open answer."""
        if self.task.OUTPUT_TYPE != "multiple_choice":
            return 0.0
        return statistics.fmean(1 / len(parts) for parts in self._documents.values())

    def run(self, progress: str | None) -> Outputs:
        """Likelihoods of all instances under the mask that is applied."""
        values = self._scorer.run(progress=progress)
        outputs = np.zeros((self._owner[-1] + 1, 2))
        np.add.at(outputs[:, 0], self._owner, values[:, 0])
        outputs[:, 1] = 1.0
        np.minimum.at(outputs[:, 1], self._owner, values[:, 1])
        return outputs

    def result(self, outputs: Outputs) -> TaskResult:
        """The task's own metrics for the likelihoods of its instances."""
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
        return TaskResult(self.task.task_name, metrics, stderr, len(self._documents), per_document)

    def _document_values(self, outputs: Outputs) -> dict[str, list[Any]]:
        """What the task makes of each document, by metric."""
        rolling = self.task.OUTPUT_TYPE == "loglikelihood_rolling"
        for instance, (likelihood, greedy) in zip(self.task.instances, outputs, strict=True):
            answer = float(likelihood) if rolling else (float(likelihood), bool(greedy))
            instance.resps, instance.filtered_resps = [answer], {}
        with harness.quiet():
            self.task.apply_filters()
            values: dict[str, list[Any]] = {}
            for parts in self._documents.values():
                parts = sorted(parts, key=lambda part: part.idx)
                chosen = next(iter(parts[0].filtered_resps))
                answers = [part.filtered_resps[chosen] for part in parts]
                for name, value in self.task.process_results(parts[0].doc, answers).items():
                    values.setdefault(name, []).append(value)
        return values


def _combine(loaded: harness.LoadedTask, parts: Sequence[TaskResult]) -> TaskResult:
    """The result of a task, or of a group by lm-eval's own rule for it (else: plain means)."""
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
        with harness.quiet():
            whole = loaded.group.aggregate(rows)
        for metric in shared:
            metrics[metric] = float(whole.get(f"{metric},{_FILTER}", metrics[metric]))
            error = whole.get(f"{metric}_stderr,{_FILTER}")
            if isinstance(error, float):
                stderr[metric] = error
    kept = [m for m in shared if all(m in part.per_document for part in parts)]
    per_document = {m: np.concatenate([part.per_document[m] for part in parts]) for m in kept}
    documents = sum(part.documents for part in parts)
    return TaskResult(loaded.name, metrics, stderr, documents, per_document)


def _documents_hash(documents: Mapping[int, Sequence[Any]]) -> str:
    """SHA-256 over the documents that are scored."""
    total = hashlib.sha256()
    for number, parts in documents.items():
        total.update(f"{number} {parts[0].doc!r}\n".encode())
    return total.hexdigest()
