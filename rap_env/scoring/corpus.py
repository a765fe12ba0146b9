"""Text to measure on, cut into windows of tokens, with its provenance.

By default the dense model writes the text itself, so no data set is needed and no benchmark
can leak into the search. A file or a hub data set is divided among the roles (calibration,
selection, report) by position, so that no role ever sees another's text.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from rap_env.errors import CorpusError, UnknownNameError

if TYPE_CHECKING:  # a `CorpusConfig` alone loads no torch
    import torch

    from rap_env.llm.elastic import ElasticLLM

log = logging.getLogger(__name__)

ROLE_SPANS = {"calibration": (0.0, 0.4), "selection": (0.4, 0.6), "report": (0.6, 1.0)}
"""Which part of a file or data set each role reads, as fractions of its tokens."""

OVERLAP_TOKENS = 32
"""Two texts overlap if they share a run of so many tokens."""

_COUNTS = ("windows", "window_tokens", "tokens", "sha256")


@dataclass(frozen=True)
class CorpusConfig:
    """Which text, how much of it, and for what.

    Attributes:
        source: ``"self"`` (written by the dense model), the path of a text file (``.txt`` or
            any other ending) or of a JSON-lines file (``.jsonl``), or ``"hub:ID"`` /
            ``"hub:ID:SUBSET"`` for a data set of the hub.
        windows: How many windows.
        window_tokens: Tokens of one window.
        seed: Chooses the windows, or seeds the model's writing.
        field: The text field of JSON lines and data sets; several are joined by ``+``, as in
            ``"question+answer"``.
        split: The split of a hub data set.
        role: ``"calibration"``, ``"selection"`` or ``"report"``; roles never share text.

    Raises:
        CorpusError: A number is out of range.
        UnknownNameError: An unknown role.
    """

    source: str = "self"
    windows: int = 4
    window_tokens: int = 128
    seed: int = 0
    field: str = "text"
    split: str = "train"
    role: str = "calibration"

    def __post_init__(self) -> None:
        if self.role not in ROLE_SPANS:
            raise UnknownNameError("corpus role", self.role, ROLE_SPANS)
        for name, least in (("windows", 1), ("window_tokens", 2), ("seed", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise CorpusError(f"{name} must be a whole number >= {least}, not {value!r}.")

    @classmethod
    def of(cls, value: CorpusConfig | dict[str, Any] | None) -> CorpusConfig:
        """The config itself, one made from a plain dict, or the default.

        Raises:
            UnknownNameError: The dict has a key that is no setting.
        """
        if isinstance(value, CorpusConfig):
            return value
        known = {f.name for f in fields(cls)}
        for key in value or {}:
            if key not in known:
                raise UnknownNameError("corpus setting", key, known)
        return cls(**(value or {}))


@dataclass(frozen=True, eq=False)
class Corpus:
    """Windows of tokens.

    Attributes:
        tokens: Token ids, int64, shape (windows, window_tokens).
        provenance: Where they came from: source, role, seed, counts and hash.
    """

    tokens: torch.Tensor
    provenance: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_tokens(cls, tokens: torch.Tensor, **origin: Any) -> Corpus:
        """A corpus from token ids of shape (windows, window_tokens).

        Raises:
            CorpusError: It is no whole-number tensor of two dimensions with at least one window.
        """
        if tokens.ndim != 2 or not len(tokens) or tokens.is_floating_point():
            raise CorpusError(
                "Tokens must be whole numbers of shape (windows, window_tokens) with at least "
                f"one window, not {tokens.dtype} of shape {tuple(tokens.shape)}."
            )
        tokens = tokens.detach().long().cpu().contiguous()
        counts = {
            "windows": tokens.shape[0],
            "window_tokens": tokens.shape[1],
            "tokens": tokens.numel(),
            "sha256": hashlib.sha256(tokens.numpy().tobytes()).hexdigest(),
        }
        return cls(tokens, {"source": "tokens", **origin, **counts})

    @classmethod
    def joined(cls, parts: Mapping[str, Corpus]) -> Corpus:
        """Several texts as one, one after the other.

        Args:
            parts: By name; all of the same window length.

        Raises:
            CorpusError: The windows differ in length, or there is no text.
        """
        import torch

        lengths = {name: part.tokens.shape[1] for name, part in parts.items()}
        if len(set(lengths.values())) != 1:
            raise CorpusError(
                f"Texts are joined where their windows have one length, but these have {lengths}; "
                "give each the same window_tokens."
            )
        described = {name: part.provenance for name, part in parts.items()}
        roles = dict.fromkeys(str(part.provenance.get("role", "")) for part in parts.values())
        tokens = torch.cat([part.tokens for part in parts.values()])
        return cls.of_tokens(tokens, source="+".join(parts), role="+".join(roles), parts=described)

    def spread(self, windows: int) -> Corpus:
        """So many windows, taken from all over the text at regular distances.

        Raises:
            CorpusError: There are not so many.
        """
        have = len(self.tokens)
        if not 1 <= windows <= have:
            raise CorpusError(
                f"From 1 to {have} windows can be taken of this text, not {windows}; give more."
            )
        chosen = [number * have // windows for number in range(windows)]
        kept = {k: v for k, v in self.provenance.items() if k not in _COUNTS}
        return Corpus.of_tokens(self.tokens[chosen], **kept, spread_over=have)

    @property
    def sha256(self) -> str:
        """Hash of the token ids, in hex."""
        return str(self.provenance["sha256"])


def load_corpus(config: CorpusConfig, llm: ElasticLLM, *, progress: bool = True) -> Corpus:
    """Read, or let the dense model write, the text that `config` describes.

    Self-written text is kept in the cache, so that every later run measures on the same tokens.

    Raises:
        CorpusError: The text is missing, empty or too short.
        MissingDependencyError: A hub data set without the `datasets` package.
    """
    from rap_env.scoring.text import cut_text, self_written  # loads torch

    found = (
        self_written(config, llm, progress) if config.source == "self" else cut_text(config, llm)
    )
    return Corpus.of_tokens(found.tokens, **found.origin)


def ensure_disjoint(first: Corpus, second: Corpus) -> None:
    """Refuse two texts that share a run of `OVERLAP_TOKENS` tokens.

    Raises:
        CorpusError: They do.
    """
    seen = set(_runs(first))
    for number, run in enumerate(_runs(second)):
        if run in seen:
            raise CorpusError(
                f"The {first.provenance.get('role', 'first')} and the "
                f"{second.provenance.get('role', 'second')} text share {len(run)} tokens in a row "
                f"(run {number}); results would be measured on text that was searched on. Choose "
                "another source, seed or role for one of them."
            )


def _runs(corpus: Corpus) -> Iterator[tuple[int, ...]]:
    for window in corpus.tokens.tolist():
        size = min(OVERLAP_TOKENS, len(window))
        yield from (tuple(window[i : i + size]) for i in range(len(window) - size + 1))


__all__ = ["Corpus", "CorpusConfig", "ensure_disjoint", "load_corpus"]
