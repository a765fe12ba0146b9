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
    """Times that the score model is fitted, the training divided among them; 0 trains on real
    scores alone."""
    first_masks: int = 1000
    """Masks really scored before the first round, where no frontier table has scores already."""
    verify_requests: int = 128
    """Requests whose masks by the policy, the best and a drawn one, are really scored after each
    round."""
    members: int = 5
    """Predictors of the ensemble."""
    doubt: float = 1.0
    """Standard deviations of the ensemble that are added to a predicted loss."""

    def __post_init__(self) -> None:
        """Refuse negative numbers."""
        at_least("score_model", 0, rounds=self.rounds, doubt=self.doubt)
        at_least("score_model", 1, first_masks=self.first_masks, members=self.members)
        at_least("score_model", 1, verify_requests=self.verify_requests)


@dataclass
class FrontierConfig:
    """The table of best known masks, which ``experiments.profile`` builds."""

    evaluations: int = 0
    """Masks that are scored at most; 0 builds no table."""
    deepest_loss: float = 3.0
    """Counts of blocks whose best mask is expected to lose more are left out, nats per token."""
    requests: int = 512
    """Requests drawn from the workload: their bytes decide which counts are of use."""

    def __post_init__(self) -> None:
        """Refuse impossible numbers."""
        at_least("frontier", 0, evaluations=self.evaluations, deepest_loss=self.deepest_loss)
        at_least("frontier", 1, requests=self.requests)
