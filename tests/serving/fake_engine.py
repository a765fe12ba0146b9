"""A fake engine with scripted answers, for events that are rare in a real one."""

import random
import threading
import time
from types import SimpleNamespace

from rap_env.models.live.elastic import HeldBytes
from rap_env.plan import Plan
from rap_env.runtime.memory_limit import GivenMemory
from rap_env.runtime.records import EngineStats
from rap_env.runtime.request_handle import AdmitEvent, EndEvent, RequestHandle, TokenEvent

NATIVE = Plan()
PLAN = Plan.of(
    dict.fromkeys(("layer00.attn", "layer01.ffn", "layer01.attn"), "removed")
    | {"layer02.cache": "int4", "layer03.cache": "int4", "layer02.ffn": "int8"}
)


def delta_nll(plan, seq_len_tokens):
    """A prediction that depends on the length; none for plans that lower embeddings."""
    rise = len(plan.levels) * seq_len_tokens / 1000
    return None if plan.embeddings != "native" else rise


class FakeEngine:
    """Gives each request the same tokens, at a pace; random ones of its constraint if it has one.

    Args:
        tokenizer: What `text` is tokenised with.
        text: Text of every answer.
        pace_s: Seconds before each token.
        gate: Waited for before the last token, if given.
        end: Reason of the end, or an exception that `submit` raises.
        error: Its sentence.
        plans: The plan of each token; the last one is also that of all further tokens.
    """

    def __init__(
        self, tokenizer, text="hello", *, pace_s=0.0, gate=None, end="stop", error=None,
        plans=(NATIVE,),
    ):  # fmt: skip
        self.tokens = tokenizer.encode(text, add_special_tokens=False)
        self.pace_s = pace_s
        self.gate = gate
        self.end = end
        self.error = error
        self.plans = plans
        self.max_seq_len_tokens = 64
        self.retry_after_s = lambda: 7
        self.nothing_fits = lambda: ""
        self.vocab_size = 61
        self.handles = []
        self.alive = True
        self.unready = None
        self.closed = False
        chooser = SimpleNamespace(
            max_delta_nll=0.1,
            policy=SimpleNamespace(name="dense"),
            delta_nll=delta_nll,
        )
        self.controller = SimpleNamespace(
            switcher=SimpleNamespace(switches=3, unreadable="The file is gone."),
            chooser=chooser,
            estimator=SimpleNamespace(memory=SimpleNamespace(facts=SimpleNamespace(num_layers=4))),
            monitor=SimpleNamespace(
                source=GivenMemory(1000),
                meter=None,
                budget_bytes=1000,
                used_bytes=700,
                margin=SimpleNamespace(bytes=30),
                held=HeldBytes(weights=600, kv_cache=70, kept=20),
            ),
        )
        self.llm = SimpleNamespace(
            fingerprint="0123",
            model=SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=[2, 7])),
        )

    clock = staticmethod(time.monotonic)

    def start(self):
        pass

    def unready_reason(self):
        return self.unready

    def close(self, timeout_s=None):
        self.closed = True
        for handle in self.handles:
            handle.cancel()

    def submit(self, prompt_ids, params, listener=None, *, owner=""):
        if isinstance(self.end, Exception):
            raise self.end
        handle = RequestHandle(tuple(prompt_ids), params, self.clock(), listener=listener)
        self.handles.append(handle)
        threading.Thread(target=self._play, args=[handle], daemon=True).start()
        return handle

    def _tokens(self, params):
        if params.constraint is None:
            yield from self.tokens
            return
        matcher, drawn = params.constraint(), random.Random(params.seed)
        while True:
            token = drawn.choice(matcher.allowed().nonzero()[:, 0].tolist())
            matcher.accept(token)
            if token in params.stop_token_ids:
                return
            yield token

    def _play(self, handle):
        handle.emit(AdmitEvent(self.clock()))
        for number, token in enumerate(self._tokens(handle.params)):
            if number == handle.params.max_new_tokens:
                return handle.emit(EndEvent("length", None, time.monotonic()))
            time.sleep(self.pace_s)
            while self.gate and number == len(self.tokens) - 1 and not handle.cancelled:
                if self.gate.wait(0.01):
                    break
            if handle.cancelled:
                return handle.emit(EndEvent("cancelled", None, time.monotonic()))
            plan = self.plans[min(number, len(self.plans) - 1)]
            handle.note_plan(plan, time.monotonic())
            handle.emit(TokenEvent(token, -0.5, time.monotonic(), plan))
        handle.emit(EndEvent(self.end, self.error, time.monotonic()))
        return None

    def stats(self):
        return EngineStats(
            queued=1, running=2, served=10, refused=1, cancelled=2, failed=3, tokens=40,
            prompt_tokens=50, repeated_tokens=6, refilled_tokens=7, plan=PLAN,
            preemptions=4, stalled_s=2.5,
            overhead_s=0.25, busy_s=9.0, kept_tokens=30, kept_sequences=4, kept_bytes=20,
        )  # fmt: skip
