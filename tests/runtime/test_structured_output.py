"""Answers that follow schemas, expressions and grammars, alone and in a running batch."""

import json
import re

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, normalizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

pytest.importorskip("llguidance", reason="the extra structured is not installed")

import llguidance.hf

from rap_env.errors import InvalidGrammarError, UnsupportedModelError
from rap_env.plan import Plan
from rap_env.runtime.controller import RuntimeController
from rap_env.runtime.engine import Engine
from rap_env.runtime.memory_monitor import TensorMeter
from rap_env.runtime.records import EngineSettings
from rap_env.runtime.sampling import SamplingParams
from rap_env.runtime.structured_output import MAX_GRAMMAR_CHARS, GrammarCompiler
from tests.runtime.harness import FakePolicy, preempt
from tests.serving.tokenizers import byte_llm, byte_tokenizer
from tests.tiny import tiny_tokenizer

END = 0
SCHEMA = {
    "type": "object",
    "properties": {"ok": {"type": "boolean"}, "n": {"enum": [1, 22, 333]}},
    "required": ["ok", "n"],
    "additionalProperties": False,
}
KINDS = {
    "json_schema": json.dumps(SCHEMA),
    "grammar": 'start: "<" item ("," item)* ">"\nitem: /[0-9]{1,3}/',
}


@pytest.fixture(scope="module")
def llm():
    return byte_llm()


@pytest.fixture(scope="module")
def compiler(llm):
    return GrammarCompiler(llm.tokenizer, vocab_size=300, stop_token_ids=[END])


def matches(kind, text):
    if kind == "json_schema":
        content = json.loads(text)
        return set(content) == {"ok", "n"} and content["n"] in (1, 22, 333)
    return re.fullmatch(r"<\d{1,3}(,\d{1,3})*>", text) is not None


def random_answer(grammar, seed, tokenizer):
    matcher, drawn = grammar(), np.random.default_rng(seed)
    tokens = []
    while not tokens or tokens[-1] != END:
        tokens.append(int(drawn.choice(np.flatnonzero(matcher.allowed().numpy()))))
        matcher.accept(tokens[-1])
    return tokenizer.decode(tokens[:-1])


@pytest.mark.parametrize("kind", KINDS)
def test_whatever_is_drawn_follows_the_grammar(kind, compiler, llm):
    grammar = compiler.compile(kind, KINDS[kind])
    for seed in range(5):
        assert matches(kind, random_answer(grammar, seed, llm.tokenizer))
    allowed = compiler.compile("grammar", r"start: /[\s\S]*/")().allowed()
    assert allowed.shape == (300,)
    assert not allowed[len(llm.tokenizer) :].any()  # logits without a token


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        ("json_schema", '{"type": "number", "type": "foo"}', "Invalid type: foo"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("grammar", "start: other", 'unknown name: "other"'),
        ("grammar", "a" * (MAX_GRAMMAR_CHARS + 1), f"at most {MAX_GRAMMAR_CHARS}"),
        ("grammar", r"start: /[^\s\S]/", "no text follows it"),
        ("json_schema", '{"items":' * 900 + "{}" + "}" * 900, "recursion limit"),
    ],
)
def test_a_grammar_that_does_not_compile_is_rejected_with_the_reason(compiler, kind, text, reason):
    with pytest.raises(InvalidGrammarError, match=reason) as found:
        compiler.compile(kind, text)
    assert "non-verbose" not in str(found.value)
    assert "\n" not in str(found.value)


def test_tokens_with_byte_fallback_are_the_bytes_that_the_library_reads():
    tokens = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "é", "▁a"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    backend = Tokenizer(BPE(vocabulary, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    replace, fallback = decoders.Replace("▁", " "), decoders.ByteFallback()
    backend.decoder = decoders.Sequence([replace, fallback, decoders.Fuse()])
    backend.normalizer = normalizers.Replace(" ", "▁")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    sizes = {"n_vocab": len(tokens) + 2, "eos_token": [1], "slices": []}
    expected = llguidance.hf.from_tokenizer(tokenizer, **sizes)
    compiler = GrammarCompiler(tokenizer, vocab_size=len(tokens) + 2, stop_token_ids=[1])
    compiler.load()
    for number in range(len(tokens)):
        own, librarys = (t.decode_bytes([number]) for t in (compiler._vocabulary, expected))
        assert own == librarys, tokens[number]
    assert compiler._vocabulary.decode_bytes([vocabulary["▁a"], vocabulary["<0xC3>"]]) == b" a\xc3"
    assert compiler._vocabulary.tokenize_str(" aaé") == expected.tokenize_str(" aaé")


def test_a_tokenizer_that_the_library_does_not_read_is_named():
    compiler = GrammarCompiler(tiny_tokenizer(), vocab_size=61, stop_token_ids=[2])
    with pytest.raises(UnsupportedModelError, match="tokenizer"):
        compiler.compile("grammar", "start: /a/")
    compiler.load()  # at the start of a server it is no error
    assert compiler._vocabulary is None
    compiler = GrammarCompiler(byte_tokenizer(), vocab_size=300, stop_token_ids=[])
    with pytest.raises(UnsupportedModelError, match="ends an answer"):
        compiler.compile("grammar", "start: /a/")


def engine_of(llm, policy=None):
    policy = policy or FakePolicy(Plan())
    controller = RuntimeController(llm, policy, lambda: 10**9, meter=TensorMeter(llm))
    controller.headroom.hold_s = 0.0
    return Engine(controller, EngineSettings(max_batch_size=6, prefill_chunk_tokens=8))


def submitted(engine, constraint, **settings):
    given = {"max_new_tokens": 200, "stop_token_ids": (END,), **settings}
    return engine.submit(range(40, 52), SamplingParams(constraint=constraint, **given))


def finish(engine):
    assert any(not engine.step() for _ in range(2000)), "still busy"


def test_each_row_of_a_batch_follows_its_own_grammar(llm, compiler):
    engine = engine_of(llm)
    free = submitted(engine, None, max_new_tokens=20)
    finish(engine)
    rows = {
        kind: submitted(engine, compiler.compile(kind, text), temperature=1.0, seed=4)
        for kind, text in KINDS.items()
    }
    again = submitted(engine, None, max_new_tokens=20)
    short = submitted(engine, compiler.compile("grammar", "start: /[ab]{30}/"), max_new_tokens=7)
    finish(engine)
    assert short.reason == "length"
    assert set(llm.tokenizer.decode(short.token_ids)) <= {"a", "b"}
    for kind, handle in rows.items():
        assert handle.reason == "stop"
        assert matches(kind, llm.tokenizer.decode(handle.token_ids)), kind
    assert again.token_ids == free.token_ids


def test_preemptions_and_changes_of_the_plan_keep_the_place_in_the_grammar(llm, compiler):
    plans = [Plan(), Plan.removing(0, 3), Plan.removing(1, 2, 5)]
    policy = FakePolicy(Plan())
    engine = engine_of(llm, policy)
    handle = submitted(engine, compiler.compile("grammar", "start: /[ab]{10}-[0-9]{10}/"))
    other = submitted(engine, compiler.compile("json_schema", KINDS["json_schema"]))
    for number in range(20):
        policy.mask = plans[number % 3]
        engine.llm.apply(policy.mask)
        engine.step()
        both_run = len(engine._scheduler.batch.sequences) == 2
        if number % 4 == 0 and both_run and handle.preemptions < 2:
            while engine._scheduler.batch.sequences:
                preempt(engine)
    finish(engine)
    assert handle.preemptions == other.preemptions == 2
    assert len(set(handle.plans)) > 1
    text = llm.tokenizer.decode(handle.token_ids)
    assert len(text) == 21
    assert text[10] == "-"
    assert matches("json_schema", llm.tokenizer.decode(other.token_ids))


def test_a_grammar_that_fails_in_the_answer_ends_its_request_alone(llm, compiler):
    class Failing:
        steps = 0

        def allowed(self):
            self.steps += 1
            if self.steps > 3:
                raise InvalidGrammarError("Too complex.")
            return torch.ones(300, dtype=torch.bool)

        def accept(self, token_id):
            pass

    engine = engine_of(llm)
    bad = submitted(engine, Failing)
    good = submitted(engine, compiler.compile("grammar", KINDS["grammar"]))
    finish(engine)
    assert (bad.reason, bad.rejection, bad.error) == ("error", "constraint", "Too complex.")
    assert len(bad.token_ids) == 3
    assert good.reason == "stop"
