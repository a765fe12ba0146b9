"""How a policy learns beside the algorithm itself: warm start, score model, curriculum."""

from __future__ import annotations

from dataclasses import dataclass

from experiments.config.parts import at_least
from rap_env.errors import UnknownNameError

TEACHERS = ("none", "frontier", "greedy")


@dataclass
class WarmStartConfig:
    """Imitation before reinforcement."""

    teacher: str = "none"
    """``none``; ``frontier``: the table of best known masks; ``greedy``: greedy searches."""
    requests: int = 512
    """Requests drawn from the workload that the teacher answers."""
    updates: int = 600
    """Updates of the network on the teacher's answers."""
    learning_rate: float = 3e-3

    def __post_init__(self) -> None:
        """Refuse unknown teachers and counts below one."""
        if self.teacher not in TEACHERS:
            raise UnknownNameError("teacher", self.teacher, TEACHERS)
        at_least("warm_start", 1, requests=self.requests, updates=self.updates)
        at_least("warm_start", 0, learning_rate=self.learning_rate)


@dataclass
class ScoreModelConfig:
    """Training on predicted scores, checked and corrected with real ones in rounds."""

    rounds: int = 0
    """Times that the score model is fitted anew; 0 trains on real scores alone."""
    verify_masks: int = 64
    """Masks that the policy chooses which are really scored after each round."""
    doubt: float = 1.0
    """Standard deviations of the ensemble that are added to a predicted loss."""

    def __post_init__(self) -> None:
        """Refuse negative numbers."""
        at_least("score_model", 0, rounds=self.rounds, doubt=self.doubt)
        at_least("score_model", 1, verify_masks=self.verify_masks)


@dataclass
class FrontierConfig:
    """The table of best known masks: how much its search may cost."""

    evaluations: int = 3000
    """Masks that are scored at most."""
    deepest_loss: float = 3.0
    """Counts of blocks whose best mask is expected to lose more are left out, nats per token."""

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        at_least("frontier", 1, evaluations=self.evaluations)
        at_least("frontier", 0, deepest_loss=self.deepest_loss)
