"""Token ids of lm-eval's requests, made by lm-eval's own code."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

from rap_env.errors import CorpusError
from rap_env.llm.elastic import ElasticLLM

TokenRequest = tuple[list[int], list[int]]
"""Token ids of a context and of the continuation whose likelihood is asked for."""


class RequestEncoder:
    """Turns a task's requests into token ids with lm-eval's own code.

    Its `HFLM` is built around the live model but never runs it: where lm-eval would compute
    likelihoods, the token ids are kept instead. So the rules for empty contexts, trailing
    spaces, start tokens and rolling windows are lm-eval's.

    Args:
        llm: The live model; neither it nor its tokenizer is changed.

    Raises:
        CorpusError: It has no tokenizer.
    """

    def __init__(self, llm: ElasticLLM) -> None:
        if llm.tokenizer is None:
            raise CorpusError(f"{llm.name} has no tokenizer to read tasks with.")
        self._lm = _recording_model(llm)
        self.max_length = int(self._lm.max_length)

    def encode(self, task: Any) -> list[list[TokenRequest]]:
        """Token requests of each of a task's instances: one, or one for each rolling window."""
        return [self._encode_one(instance) for instance in task.instances]

    def _encode_one(self, instance: Any) -> list[TokenRequest]:
        self._lm.recorded = []
        if instance.request_type == "loglikelihood_rolling":
            self._lm.loglikelihood_rolling([instance], disable_tqdm=True)
        else:
            self._lm.loglikelihood([instance], disable_tqdm=True)
        requests: list[TokenRequest] = self._lm.recorded
        for context, continuation in requests:
            if not context or not continuation or len(continuation) > self.max_length:
                raise CorpusError(
                    f"A request of the task {instance.task_name!r} has {len(context)} context and "
                    f"{len(continuation)} continuation tokens; there must be one of each at least, "
                    f"and at most {self.max_length} to continue with (the model's positions)."
                )
        return requests


def _recording_model(llm: ElasticLLM) -> Any:
    from lm_eval.models.huggingface import HFLM

    class Recorder(HFLM):  # type: ignore[misc]
        recorded: list[TokenRequest]

        def _loglikelihood_tokens(self, requests: Any, **_: Any) -> list[tuple[float, bool]]:
            self.recorded.extend((list(context), list(target)) for _, context, target in requests)
            return [(0.0, False)] * len(requests)

    with _untouched(llm.model):
        return Recorder(
            pretrained=llm.model,
            backend="causal",
            # lm-eval gives a tokenizer without a padding token one.
            tokenizer=copy.deepcopy(llm.tokenizer),
            batch_size=64,
        )


@contextlib.contextmanager
def _untouched(model: Any) -> Iterator[None]:
    """Keep `HFLM` from tying weights anew, which would undo a quantised head."""
    model.tie_weights = lambda *_args, **_kwargs: None
    try:
        yield
    finally:
        del model.tie_weights
