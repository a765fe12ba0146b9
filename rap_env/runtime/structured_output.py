"""Output that follows a JSON schema or a grammar, by `llguidance`.

The library is the extra ``structured``. Shapes: V entries of the model's vocabulary.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch

from rap_env.errors import InvalidGrammarError, MissingDependencyError, UnsupportedModelError
from rap_env.extras import require_extra

GrammarKind = Literal["json_schema", "grammar", "regex", "choice"]
"""How a grammar is written: as a JSON schema, in the form of Lark or GBNF, as a regular expression,
or as texts in a list of JSON."""

MAX_GRAMMAR_CHARS = 32_768
"""Longest text of a grammar: its length bounds the time to compile it, to some 2 seconds."""
WHITESPACE = r"[ \n\t]{1,20}"
"""White space between the parts of JSON. A small model that may write any amount does."""
_NO_SCHEMAS = frozenset({"const", "enum", "default", "examples"})
_SAYS = frozenset({"additionalProperties", "patternProperties", "unevaluatedProperties"})
_MERGED = frozenset({"allOf", "anyOf", "oneOf", "$ref"})


def closed_schema(schema: Any) -> Any:
    """A JSON schema whose objects have no properties but those it names, unless it says so.

    A schema that merges objects (several in ``allOf``, or other schemas beside ``properties``)
    stays as it is in all its parts: closed, they would exclude each other's properties.
    """

    def merges(part: Any) -> bool:
        parts = part.values() if isinstance(part, dict) else part if isinstance(part, list) else ()
        own = part if isinstance(part, dict) else {}
        several = isinstance(own.get("allOf"), list) and len(own["allOf"]) > 1
        beside = "properties" in own and not own.keys().isdisjoint(_MERGED)
        return several or beside or any(map(merges, parts))

    def close(part: Any, key: str = "") -> Any:
        if isinstance(part, list) and key not in _NO_SCHEMAS:
            return [close(each) for each in part]
        if not isinstance(part, dict) or key in _NO_SCHEMAS:
            return part
        result = {name: close(value, name) for name, value in part.items()}
        if isinstance(part.get("properties"), dict) and part.keys().isdisjoint(_SAYS):
            result["additionalProperties"] = False
        return result

    return schema if merges(schema) else close(schema)


class GrammarMatcher:
    """Follows the tokens of one answer and knows which ones may come next.

    Made by what `GrammarCompiler.compile` returns.
    """

    def __init__(self, matcher: Any, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def allowed(self) -> torch.Tensor:
        """Whether each token may come next, (V,); after the last token only stop tokens may.

        Raises:
            InvalidGrammarError: It takes more than the library's limits of a step.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise InvalidGrammarError(f"The answer's grammar failed: {_reason(self._matcher)}")
        allowed = np.unpackbits(bits, count=self._vocab_size, bitorder="little")
        return torch.from_numpy(allowed.view(np.bool_))

    def accept(self, token_id: int) -> None:
        """Move on by a token that `allowed` has; if that fails, `allowed` raises an error."""
        self._matcher.consume_token(token_id)


class GrammarCompiler:
    """Compiles grammars for one tokenizer; from any thread.

    The first grammar takes longer, a fifth of a second for a vocabulary of 49,152 tokens,
    unless the vocabulary is loaded before: some 5 MiB of a tokenizer that is byte-level or
    has byte fallback, 30 MiB and more of another one.

    Args:
        tokenizer: A tokenizer of the library `tokenizers`, as most in transformers are.
        vocab_size: V.
        stop_token_ids: Tokens that end an answer, at least one.
    """

    def __init__(self, tokenizer: Any, *, vocab_size: int, stop_token_ids: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._stop_token_ids = list(stop_token_ids)
        self._lock = threading.Lock()
        self._vocabulary: Any = None

    def load(self) -> None:
        """Load the vocabulary now, so that no later grammar takes its memory and time.

        Does nothing if the library is not installed or does not take the tokenizer.
        """
        with self._lock, contextlib.suppress(MissingDependencyError, UnsupportedModelError):
            self._vocabulary = self._vocabulary or self._load()

    def compile(
        self, kind: GrammarKind, text: str, notes: list[str] | None = None
    ) -> Callable[[], GrammarMatcher]:
        """Compile a grammar, and compute what may come first.

        Args:
            kind: How it is written.
            text: The grammar.
            notes: Gets what is left out of a JSON schema, such as ``uniqueItems``; without,
                that is an error.

        Returns:
            A function that makes a matcher at the start of an answer; any number may follow
            it.

        Raises:
            InvalidGrammarError: It is too long or too complex, or the library does not take
                it.
            MissingDependencyError: The extra ``structured`` is not installed.
            UnsupportedModelError: The library does not take the tokenizer, or no token ends
                an answer.
        """
        if len(text) > MAX_GRAMMAR_CHARS:
            raise InvalidGrammarError(
                f"The grammar has {len(text)} characters; at most {MAX_GRAMMAR_CHARS} are compiled."
            )
        with self._lock:  # one at a time, so that many large grammars take one core
            matcher = self._matcher(kind, text, lenient=notes is not None)
        if matcher.is_error():
            raise InvalidGrammarError(f"The grammar cannot be compiled: {_reason(matcher)}")
        if notes is not None:
            notes.extend(matcher.get_grammar_warnings())
        return lambda: GrammarMatcher(matcher.deep_copy(), self._vocab_size)

    def _matcher(self, kind: GrammarKind, text: str, *, lenient: bool) -> Any:
        """The library's matcher, which may have an error."""
        if self._vocabulary is None:
            self._vocabulary = self._load()
        import llguidance

        try:
            if kind == "json_schema":
                defaults: Any = {"whitespace_pattern": WHITESPACE, "lenient": lenient}
                grammar = llguidance.LLMatcher.grammar_from_json_schema(text, defaults=defaults)
            else:
                grammar = llguidance.grammar_from(kind, text)
        except (ValueError, RecursionError) as error:
            raise InvalidGrammarError(f"The grammar cannot be compiled: {error}.") from None
        limits = llguidance.LLParserLimits(verbose_errors=False)
        matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # what may come first is too complex, or nothing may
        return matcher

    def _load(self) -> Any:
        """The vocabulary in the library's form."""
        require_extra("structured", "Structured output")
        import llguidance.hf
        from tokenizers.decoders import ByteLevel

        if not self._stop_token_ids:
            raise UnsupportedModelError(
                "Structured output needs a token that ends an answer, and the model has none."
            )
        tokenizer, stops = self._tokenizer, self._stop_token_ids
        sizes: dict[str, Any] = {"n_vocab": self._vocab_size, "eos_token": stops, "slices": []}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        decoder = getattr(backend, "decoder", None)
        falls_back = decoder is not None and json.loads(decoder.__getstate__()) == _BYTE_FALLBACK
        if isinstance(decoder, ByteLevel) or falls_back:
            tokens = _Tokens(backend, stops[0], byte_level=not falls_back)
            return llguidance.LLTokenizer(llguidance.TokenizerWrapper(tokens), **sizes)
        try:
            return llguidance.hf.from_tokenizer(tokenizer, **sizes)
        except ValueError as error:
            raise UnsupportedModelError(
                f"llguidance does not support this model's tokenizer: {error}"
            ) from None


_BYTE_FALLBACK = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}
"""The decoder of a tokenizer with tokens such as ``▁the`` and ``<0x0A>``."""
_BYTE = re.compile("<0x([0-9A-F]{2})>")


class _Tokens:
    """The tokens of a tokenizer as bytes; the library copies no tokenizer then.

    It is byte-level, or has `_BYTE_FALLBACK`.

    Attributes and calls are what ``llguidance.TokenizerWrapper`` asks for.
    """

    bos_token_id = None

    def __init__(self, backend: Any, eos_token_id: int, *, byte_level: bool) -> None:
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        letters: dict[int, str] = bytes_to_unicode()  # type: ignore[no-untyped-call]
        values = {letter: byte for byte, letter in letters.items()}
        added = backend.get_added_tokens_decoder()
        texts = map(backend.id_to_token, range(backend.get_vocab_size()))
        self._backend = backend
        self.eos_token_id = eos_token_id
        self.special_token_ids = [number for number, token in added.items() if token.special]

        def bytes_of(text: str) -> bytes:
            if byte_level:
                return bytes(values[letter] for letter in text)
            byte = _BYTE.fullmatch(text)
            return bytes.fromhex(byte[1]) if byte else text.replace("▁", " ").encode()

        self.tokens = [
            text.encode() if number in added else bytes_of(text or "")
            for number, text in enumerate(texts)
        ]

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return ids


def _reason(matcher: Any) -> str:
    """The library's error message, without its internal state and the grammar around it."""
    text: str = matcher.get_error()
    if text.startswith("NoExtension"):
        return "no text follows it"
    return text.partition("<non-verbose/>")[0].strip().partition("\n")[0]
