"""An agent: an `Algorithm` and the file of its values, ``../conf/agent/fading_ppo.yaml``."""

from dataclasses import dataclass
from typing import Any

from sb3_contrib import MaskablePPO

from agents.algorithms import Algorithm, PPOHyperparameters
from agents.networks import MaskableBlockwisePolicy
from rap_env.specs import setting


@dataclass(frozen=True)
class FadingHyperparameters(PPOHyperparameters):
    """Hyperparameters of ``maskable_ppo``, and the share of the entropy bonus at the end."""

    last_ent_coef: float = setting(low=0, high=1)


class FadingPPO(MaskablePPO):
    """MaskablePPO whose entropy bonus falls linearly over the training."""

    def __init__(self, *args: Any, last_ent_coef: float = 0.0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.first_ent_coef, self.last_ent_coef = self.ent_coef, last_ent_coef

    def train(self) -> None:
        """Update the networks with the current bonus."""
        share = self.last_ent_coef + (1 - self.last_ent_coef) * self._current_progress_remaining
        self.ent_coef = self.first_ent_coef * share
        super().train()


FADING_PPO = Algorithm(
    FadingPPO, MaskableBlockwisePolicy, FadingHyperparameters, masked=True, checkpoint_steps=1
)
