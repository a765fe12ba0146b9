"""Scores plans on lm-eval tasks: requests are built once, then only the model runs."""

from __future__ import annotations

import importlib.metadata
import logging
import math
import statistics
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from rap_env.errors import NonFiniteScoreError, UnknownNameError
from rap_env.extras import require_extra
from rap_env.memory import MemoryModel
from rap_env.models.live.elastic import ElasticLLM
from rap_env.plan import Plan
from rap_env.scoring import likelihoods, lm_eval_tasks
from rap_env.scoring.likelihoods import RequestEncoder
from rap_env.scoring.lm_eval_tasks import TaskConfig
from rap_env.scoring.long_context_tasks import check_fits, long_context_task
from rap_env.scoring.scorer import levels_context, model_context
from rap_env.scoring.store import ScoreStore, context_key
from rap_env.scoring.task_results import Outputs, TaskRequests, TaskResult

log = logging.getLogger(__name__)

_METRIC = "loglikelihoods"
_MULTIPLE_CHOICE = [name for name in lm_eval_tasks.KNOWN_TASKS if name != "lambada_openai"]


class TaskScorer:
    """Measures the model's scores on lm-eval tasks under plans.

    The tasks' own code computes every metric from the log-likelihoods of their requests. Only
    these likelihoods are computed here and kept in the store.

    Args:
        llm: The live model; its plan is restored after each call.
        config: Which tasks.
        store: Keeps likelihoods between runs; None keeps results in this object only.

    Attributes:
        evaluations: Plans for which the model ran; those found in the store do not count.

    Raises:
        MissingDependencyError: lm-eval is not installed.
        UnknownNameError: There is no such task.
        CorpusError: A task's data is missing or does not match, or the model has no tokenizer.
    """

    def __init__(
        self, llm: ElasticLLM, config: TaskConfig, store: ScoreStore | None = None
    ) -> None:
        require_extra("eval", "Scoring tasks")
        self.llm = llm
        self.config = config
        self.store = store
        self.evaluations = 0
        with lm_eval_tasks.quiet():
            encoder = RequestEncoder(llm)
            for task in filter(None, map(long_context_task, config.names)):
                check_fits(task, encoder.max_length, llm.name)
            self._tasks = {
                name: TaskRequests(
                    llm, lm_eval_tasks.load_task(name, config, llm.tokenizer), encoder, config
                )
                for name in dict.fromkeys(lm_eval_tasks.members(config.names))
            }
        self._results: dict[Plan, dict[str, TaskResult]] = {}
        common = {
            **model_context(llm),
            "batch": [likelihoods.BATCH_ROWS, likelihoods.BATCH_TOKENS, likelihoods.HEAD_TOKENS],
            "lm_eval": importlib.metadata.version("lm_eval"),
        }
        self.context: Mapping[str, Any] = {
            **common,
            "tasks": {name: task.context for name, task in self._tasks.items()},
        }
        self._contexts = {
            name: {**common, "task": task.context} for name, task in self._tasks.items()
        }

    @cached_property
    def chance(self) -> dict[str, float]:
        """Accuracy of guessing, by task: mean of 1 / choices, 0 for open answers."""
        return {name: task.chance for name, task in self._tasks.items()}

    def accuracies(self, plan: Plan, metric: str = "acc") -> dict[str, float]:
        """Accuracy by task under a plan, each in [0, 1].

        Tasks without it are left out; `results` has all their metrics.

        Args:
            plan: The plan.
            metric: ``acc``, or ``acc_norm``: with the likelihood of each choice divided by its
                length in bytes, for tasks whose choices are whole answers.

        Raises:
            UnknownNameError: The plan names items or levels that the model does not have.
            NonFiniteScoreError: The model gave NaN or infinity.
        """
        results = self.results(plan)
        return {n: r.metrics[metric] for n, r in results.items() if metric in r.metrics}

    def right_answers(self, plan: Plan) -> dict[str, npt.NDArray[np.float64]]:
        """Which documents are answered right under a plan: 1 or 0 for each, (documents,), by task.

        By ``acc_norm`` where lm-eval has it for the task, else by ``acc``; tasks with neither are
        left out. The errors are those of `accuracies`.
        """
        answers = {name: result.per_document for name, result in self.results(plan).items()}
        return {
            name: values.get("acc_norm", values["acc"])
            for name, values in answers.items()
            if "acc" in values
        }

    def flipped_answers_share(self, plan: Plan) -> float | None:
        """Share of multiple-choice answers that are right under a plan and wrong natively, or back.

        Over the documents of all tasks; None without multiple-choice tasks. Source: the flips of
        Dutta et al. (2024), Accuracy is Not All You Need. The errors are those of `accuracies`.
        """
        native = self.right_answers(Plan())
        flipped = [
            right != native[name]
            for name, right in self.right_answers(plan).items()
            if len(self.results(plan)[name].choice_nll)
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
        per_task = [result.choice_nll for result in self.results(plan).values()]
        for name, nll in zip(self.config.names, per_task, strict=True):
            if not len(nll):
                raise UnknownNameError("multiple-choice task", name, _MULTIPLE_CHOICE)
        return statistics.fmean(float(nll.mean()) for nll in per_task)

    def results(self, plan: Plan) -> dict[str, TaskResult]:
        """All metrics, standard errors and document counts by task under a plan.

        The errors are those of `accuracies`.
        """
        if plan not in self._results:
            MemoryModel(self.llm).check_plan(plan)
            outputs = self._outputs(plan)
            with lm_eval_tasks.quiet():
                self._results[plan] = {
                    name: task.result(outputs[name]) for name, task in self._tasks.items()
                }
        return dict(self._results[plan])

    def _outputs(self, plan: Plan) -> dict[str, Outputs]:
        """Likelihoods by task, from the store or the model."""
        contexts = {n: {**own, **levels_context(plan)} for n, own in self._contexts.items()}
        outputs: dict[str, Outputs] = {}
        keys = {} if self.store is None else {n: context_key(own) for n, own in contexts.items()}
        for name, key in keys.items():
            if self.store is not None and (values := self.store.get(key, plan, _METRIC)):
                outputs[name] = np.array(values).reshape(-1, 2)
        missing = [name for name in self._tasks if name not in outputs]
        with self.llm.masked(plan):
            for name in missing:
                outputs[name] = self._measure(name, plan)
                if self.store is not None:
                    values = outputs[name].reshape(-1).tolist()
                    self.store.put(keys[name], plan, _METRIC, values, contexts[name])
        self.evaluations += bool(missing)
        return outputs

    def _measure(self, name: str, plan: Plan) -> Outputs:
        outputs = self._tasks[name].run()
        if not np.isfinite(outputs).all():
            raise NonFiniteScoreError(
                f"{self.llm.name} ({self.llm.facts.dtype}) gave a non-finite likelihood on the "
                f"task {name!r} ({plan}); check the weights, or load the model with "
                "dtype='float32'."
            )
        return outputs
