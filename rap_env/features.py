"""What an agent sees of the importance scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True, eq=False)
class ImportanceFeatures:
    """Importance of the 2L blocks as plain arrays.

    Attributes:
        one_shot: Loss rise without the block alone, nats per token, (2L,).
        gsi_rank: Place in the GSI order, 0 = removed first, 1 = last, (2L,).
        gsi_marginal_loss: Loss rise at its removal in that order, nats per token, (2L,).
    """

    one_shot: npt.NDArray[np.float64]
    gsi_rank: npt.NDArray[np.float64]
    gsi_marginal_loss: npt.NDArray[np.float64]

    @classmethod
    def none(cls, num_blocks: int) -> ImportanceFeatures:
        """Zeros: an agent that has to find out by itself."""
        zeros = np.zeros(num_blocks)
        return cls(zeros, zeros, zeros)

    @classmethod
    def from_one_shot(cls, loss_rise: npt.NDArray[np.float64]) -> ImportanceFeatures:
        """The one-shot order in the place of the GSI order, where no GSI was run."""
        rank = np.argsort(np.argsort(loss_rise, kind="stable")) / max(1, len(loss_rise) - 1)
        return cls(loss_rise, rank, loss_rise)
