"""An ensemble of loss predictors: its mean predicts, its spread says where not to believe it.

A policy that is trained on predicted losses alone finds the masks that the predictor has hardly
seen and takes to be harmless. Members that were fitted to different samples of the measured masks
agree where there is evidence and not where there is none, so a loss is taken to be as many
standard deviations worse than their mean as one doubts them (Chua et al. 2018, arXiv
1805.12114, fit such bootstraps; pessimism as in Yu et al. 2020, MOPO, arXiv 2005.13239).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from rap_env.scoring.fidelity import Fidelity
from rap_env.scoring.predictor import Fit, Floats, LossPredictor, Removed, fit_predictor

MEMBERS = 5


@dataclass(frozen=True, eq=False)
class ScoreModel:
    """Predicts losses of masks in nats per token, pessimistically.

    Attributes:
        members: Predictors, each fitted to another sample of the measured masks.
        doubt: Standard deviations between members that are added to their mean.
    """

    members: tuple[LossPredictor, ...]
    doubt: float = 0.0

    def loss(self, removed: Collection[int]) -> float:
        """The loss without some blocks: mean and `doubt` times the spread, nats per token.

        Args:
            removed: Their indices.
        """
        found = [member.loss(removed) for member in self.members]
        return float(np.mean(found) + self.doubt * np.std(found))

    def losses(self, removed: Removed) -> Floats:
        """As `loss`, for many masks at once.

        Args:
            removed: True for each removed block of each mask, (N, 2L).

        Returns:
            Nats per token, (N,).
        """
        mean, spread = self.mean_and_spread(removed)
        return mean + self.doubt * spread

    def mean_and_spread(self, removed: Removed, *, guarded: bool = True) -> tuple[Floats, Floats]:
        """Mean and standard deviation of the members' predictions, nats per token, (N,) each."""
        found = np.array([m.losses(removed, guarded=guarded) for m in self.members])
        return found.mean(axis=0), found.std(axis=0)


def fit_score_model(
    removed: Removed,
    losses: Floats,
    alone: Floats,
    *,
    members: int = MEMBERS,
    doubt: float = 0.0,
    seed: int = 0,
) -> tuple[ScoreModel, Fidelity]:
    """Fit an ensemble to measured masks, and find out how good one member is on others.

    Args:
        removed: True for each removed block of each mask, (N, 2L).
        losses: Their losses, nats per token, (N,).
        alone: Loss without each block alone, nats per token, (2L,).
        members: Predictors; one alone is fitted to all masks, several to bootstrap samples.
        doubt: As in `ScoreModel`.
        seed: Decides which masks are held out, and the samples.

    Returns:
        The ensemble, and the fidelity of a single predictor that never saw the held-out masks:
        the settings that served it best are those of all members.
    """
    single, fidelity = fit_predictor(removed, losses, alone, seed=seed)
    if members == 1:
        return ScoreModel((single,), doubt), fidelity
    rng = np.random.default_rng([seed, members])
    samples = [rng.integers(len(losses), size=len(losses)) for _ in range(members)]
    found = []
    for sample in samples:
        fit = Fit(removed, losses, alone, [sample], reaches=(single.reach,))
        found.append(fit.solved([0], single.reach, single.ridge))
    return ScoreModel(tuple(found), doubt), fidelity
