"""Costs of levels by kind of text, from which a policy chooses by the text of the prompts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, Self

import numpy as np

from rap_env.artifacts import load_artifact, save_artifact
from rap_env.errors import ArtifactError
from rap_env.importance.level_costs import LevelCosts
from rap_env.importance.profiles import check_measured
from rap_env.importance.text_kinds import Shares, TextKinds
from rap_env.model_facts import HasFacts


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
            ArtifactError: It is truncated, altered, or of another model or format of its weights.
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
