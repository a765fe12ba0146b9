"""Tells what kind of text a prompt is, from its tokens alone, and what levels cost on each kind.

No model is run; needs numpy only.

A kind is known by the frequencies of its tokens in a calibration text: naive Bayes over
tokens (McCallum and Nigam 1998, A comparison of event models for naive Bayes text
classification), with frequencies smoothed towards those of all kinds (Zhai and Lafferty 2001,
A study of smoothing methods for language models). Tokens of a text depend on each other, so
their evidence counts as that of the square root of their number.

A prompt whose tokens are unlikely even in its likeliest kind is of no known kind. The bound
is set for each kind by parts of its own text that are left out in turn.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from rap_env.artifacts import load_artifact, save_artifact
from rap_env.errors import ArtifactError
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.profiles import check_measured
from rap_env.model_facts import HasFacts

Floats = npt.NDArray[np.float64]

Shares = tuple[float, ...]
"""Shares of the known kinds in a prompt, in their order, with the sum 1; empty if it is of
none."""

_PART_TOKENS = 64  # of a text that is left out in turn

LEAST_TOKENS = 4 * _PART_TOKENS
"""Fewest tokens of a kind's calibration text."""

_SMOOTHING_TOKENS = 1000.0  # weight of the frequencies of all kinds
_DEVIATIONS = 3.0  # below the mean log-probability of a kind, from which a prompt is of none
_STEP = 8  # shares are multiples of 1/8, so that few of them differ


@dataclass(frozen=True, eq=False)
class TextKinds:
    """Kinds of text, K of them, by the tokens of a calibration text of each.

    Attributes:
        vocab_size: Number of tokens of the vocabulary, V.
        token_ids: The tokens that occur in each kind's text, ascending, by its name.
        counts: How often each of them occurs.
        typical: Mean and standard deviation of the log-probability of a token in left-out
            parts of each kind's text, in nats per token.
    """

    vocab_size: int
    token_ids: dict[str, Sequence[int]]
    counts: dict[str, Sequence[int]]
    typical: dict[str, tuple[float, float]]

    @classmethod
    def of(cls, texts: Mapping[str, npt.NDArray[np.integer[Any]]], vocab_size: int) -> Self:
        """Learn kinds from calibration texts.

        Args:
            texts: The tokens of each kind's text, by its name; windows of any shape.
            vocab_size: V.

        Raises:
            ArtifactError: There is no kind, or one has fewer tokens than `LEAST_TOKENS`.
        """
        short = [f"{t.size} of {name}" for name, t in texts.items() if t.size < LEAST_TOKENS]
        if not texts or short:
            raise ArtifactError(
                f"Kinds of text are told by at least {LEAST_TOKENS} tokens of each, not by "
                f"{', '.join(short) or 'none'}."
            )
        seen = {n: np.unique(tokens, return_counts=True) for n, tokens in texts.items()}
        token_ids = {name: ids.tolist() for name, (ids, _) in seen.items()}
        counts = {name: numbers.tolist() for name, (_, numbers) in seen.items()}
        dense = _dense(token_ids, counts, vocab_size)
        parts = (_left_out(dense, n, tokens.ravel()) for n, tokens in enumerate(texts.values()))
        moments = [(float(np.mean(logs)), float(np.std(logs))) for logs in parts]
        return cls(vocab_size, token_ids, counts, dict(zip(texts, moments, strict=True)))

    @property
    def names(self) -> list[str]:
        """Names of the kinds."""
        return list(self.token_ids)

    def shares(self, prompt_ids: Sequence[int]) -> Shares:
        """The shares of the kinds in a prompt: their probabilities, in steps of an eighth.

        Args:
            prompt_ids: Its tokens, each below `vocab_size`.
        """
        if not len(prompt_ids):
            return ()
        count = len(prompt_ids)
        logs = self._log_probabilities[:, np.asarray(prompt_ids)].mean(axis=1)
        mean, deviation = list(self.typical.values())[best := int(np.argmax(logs))]
        spread = deviation * np.sqrt(max(1.0, _PART_TOKENS / count))
        if logs[best] < mean - _DEVIATIONS * spread:
            return ()
        weights = np.exp((logs - logs[best]) * np.sqrt(count))
        return _rounded(weights / weights.sum())

    @cached_property
    def _log_probabilities(self) -> Floats:
        """Of each token in each kind, (K, V)."""
        counts = _dense(self.token_ids, self.counts, self.vocab_size)
        of_all, own_tokens = counts.sum(axis=0), counts.sum(axis=1, keepdims=True)
        logs = _smoothed(counts, of_all, own_tokens, own_tokens.sum(), self.vocab_size)
        return np.asarray(logs)


def mean_shares(shares: Sequence[Shares]) -> Shares:
    """The shares of the kinds in several prompts together; a prompt of no kind has equal ones."""
    known = [share for share in shares if share]
    if not known:
        return ()
    equal = (1 / len(known[0]),) * len(known[0])
    return _rounded(np.mean([share or equal for share in shares], axis=0))


def _dense(
    token_ids: Mapping[str, Sequence[int]], counts: Mapping[str, Sequence[int]], vocab_size: int
) -> Floats:
    """How often each token occurs in each kind's text, (K, V)."""
    dense = np.zeros((len(token_ids), vocab_size))
    for row, name in zip(dense, token_ids, strict=True):
        row[np.asarray(token_ids[name])] = counts[name]
    return dense


def _rounded(shares: Floats) -> Shares:
    """Shares in steps of an eighth, with the sum 1: the largest remainders are rounded up."""
    steps = shares * _STEP
    whole = np.floor(steps)
    up = np.argsort(whole - steps, kind="stable")[: round(_STEP - whole.sum())]
    whole[up] += 1
    return tuple((whole / _STEP).tolist())


def _smoothed(own: Any, of_all: Any, own_tokens: Any, all_tokens: Any, vocab_size: int) -> Any:
    """Log-probabilities of tokens in a kind.

    Args:
        own: How often they occur in its text.
        of_all: How often they occur in the texts of all kinds.
        own_tokens: Tokens of its text.
        all_tokens: Tokens of all texts.
        vocab_size: V.
    """
    expected = _SMOOTHING_TOKENS * (of_all + 1) / (all_tokens + vocab_size)
    return np.log((own + expected) / (own_tokens + _SMOOTHING_TOKENS))


def _left_out(counts: Floats, row: int, tokens: npt.NDArray[np.integer[Any]]) -> list[float]:
    """Mean log-probability of each part of a kind's text by the rest of all texts, (parts,)."""
    own, of_all = counts[row], counts.sum(axis=0)
    means = []
    for part in np.array_split(tokens, len(tokens) // _PART_TOKENS):
        less = np.bincount(part, minlength=len(own))[part]
        logs = _smoothed(
            own[part] - less,
            of_all[part] - less,
            own.sum() - len(part),
            of_all.sum() - len(part),
            len(own),
        )
        means.append(float(logs.mean()))
    return means


@dataclass(frozen=True, eq=False)
class KindCosts:
    """Costs of the levels of one model's items on several kinds of text.

    Attributes:
        kinds: Tells the kind of a prompt.
        costs: Costs on the calibration text of each kind, by its name.

    Raises:
        ArtifactError: Kinds and costs have different names.
    """

    KIND: ClassVar[str] = "level costs by kind of text"
    FORMAT: ClassVar[int] = 1

    kinds: TextKinds
    costs: dict[str, LevelCosts]

    def __post_init__(self) -> None:
        if list(self.costs) != self.kinds.names:
            raise ArtifactError(
                f"Costs on the kinds of text {', '.join(self.costs)} need the tokens of these "
                f"kinds in this order, not of {', '.join(self.kinds.names)}."
            )

    def mean(self, shares: Shares = ()) -> LevelCosts:
        """Costs on text with some shares of the kinds; with equal ones if it is of none."""
        costs = list(self.costs.values())
        if not shares:
            return mean_costs(costs)
        present = [(cost, share) for cost, share in zip(costs, shares, strict=True) if share > 0]
        return mean_costs(*map(list, zip(*present, strict=True)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write them as a checked JSON artifact.

        Raises:
            StorageFullError: The disk is full.
        """
        # A list, because the names of an artifact's objects are sorted.
        body = {
            "kinds": asdict(self.kinds),
            "costs": [{"kind": name, **asdict(costs)} for name, costs in self.costs.items()],
        }
        save_artifact(path, self.KIND, self.FORMAT, body, compress=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: HasFacts) -> Self:
        """Read what `save` wrote.

        Raises:
            FileNotFoundError: There is no such file.
            ArtifactError: It is truncated, altered, or of another model or format of its
                weights.
        """
        body = load_artifact(path, cls.KIND, cls.FORMAT)
        costs = {fields.pop("kind"): LevelCosts(**fields) for fields in body["costs"]}
        for costs_of_kind in costs.values():
            check_measured(path, costs_of_kind.provenance, model)
            costs_of_kind.check_weights(path, model)
        kinds, facts = body["kinds"], model.facts
        if kinds["vocab_size"] != facts.vocab_size:
            raise ArtifactError(
                f"{os.fspath(path)} tells kinds of text by a vocabulary of {kinds['vocab_size']} "
                f"tokens, but {facts.name} has {facts.vocab_size}; measure it with this model."
            )
        tables = ("token_ids", "counts", "typical")
        in_order = ({kind: kinds[name][kind] for kind in costs} for name in tables)
        return cls(TextKinds(kinds["vocab_size"], *in_order), costs)


def mean_costs(costs: Sequence[LevelCosts], weights: Sequence[float] | None = None) -> LevelCosts:
    """The weighted mean of costs on several texts with windows of one length.

    Args:
        costs: The costs, K of them, of the same items and levels.
        weights: Weights of the texts, with the sum 1, (K,); None for equal ones.

    Raises:
        ArtifactError: Some of them lack an item, a level or a plan that others have, or were
            measured on windows of another length.
    """
    if len({each.window_tokens for each in costs}) > 1:
        lengths = sorted({each.window_tokens for each in costs})
        raise ArtifactError(
            f"Costs of levels on windows of {lengths} tokens have no common mean; measure all "
            "of them on windows of one length."
        )
    names = ("one_shot", "errors", "joint")  # the mean of errors is an upper bound
    means = {name: _mean([getattr(each, name) for each in costs], weights) for name in names}
    texts = [each.provenance["text"] for each in costs]
    text = {
        "source": ", ".join(dict.fromkeys(text["source"] for text in texts)),
        "windows": sum(text["windows"] for text in texts),
        "window_tokens": costs[0].window_tokens,
    }
    return replace(costs[0], **means, provenance={**costs[0].provenance, "text": text})


def _mean(parts: list[Any], weights: Sequence[float] | None) -> Any:
    if not isinstance(parts[0], dict):
        return float(np.average(parts, weights=weights))
    if any(part.keys() != parts[0].keys() for part in parts):
        raise ArtifactError(
            "Costs of levels on several texts name different items, levels or plans; measure all "
            "of them with the same levels."
        )
    return {name: _mean([part[name] for part in parts], weights) for name in parts[0]}
