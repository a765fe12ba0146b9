"""The switches of the block-wise networks, checked by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from agents.errors import AgentConfigError
from rap_env.block_rows import ABLATIONS
from rap_env.errors import UnknownNameError

HIDDEN = 32
"""Hidden units of the networks, if nothing else is asked for."""


@dataclass(frozen=True)
class PolicySettings:
    """Settings of a block-wise policy.

    Attributes:
        hidden: Hidden units of each layer.
        block_vectors: Width of a small learned vector for each block, which its row carries;
            0 for none. Better on the model that the policy was trained on, but it does not
            transfer to a model with another number of layers.
        without: What the network does not see, each an ablation: ``gsi`` (rank and marginal
            loss), ``one_shot`` (the loss rise), ``request`` (the request, and what a block
            frees for it: the policy is then one static order of removal).

    Raises:
        UnknownNameError: There is no such ablation.
        AgentConfigError: A value is impossible.
    """

    hidden: int = HIDDEN
    block_vectors: int = 0
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for key, least in (("hidden", 1), ("block_vectors", 0)):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise AgentConfigError(
                    f"policy_settings.{key} must be a whole number of at least {least}, "
                    f"not {value!r}."
                )
        if isinstance(self.without, str) or not isinstance(self.without, list | tuple):
            raise AgentConfigError(
                f"policy_settings.without must be a list of ablations, not {self.without!r}."
            )
        for name in self.without:
            if name not in ABLATIONS:
                raise UnknownNameError("ablation in policy_settings.without:", name, ABLATIONS)
        object.__setattr__(self, "without", tuple(self.without))

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> PolicySettings:
        """The settings in a plain dict; what is not given keeps its default.

        Raises:
            UnknownNameError: There is no such setting or ablation.
            AgentConfigError: A value is impossible.
        """
        known = [entry.name for entry in fields(cls)]
        for key in given:
            if key not in known:
                raise UnknownNameError("setting of the block-wise policy:", key, known)
        return cls(**given)

    def policy_kwargs(self) -> dict[str, Any]:
        """The same in the terms of stable-baselines3's policies."""
        seen = asdict(self)
        return {"hidden": seen.pop("hidden"), "features_extractor_kwargs": seen}
