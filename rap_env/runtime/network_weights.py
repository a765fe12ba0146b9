"""The weights of a block-wise policy network, as plain arrays that fit together."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from rap_env.block_rows import ABLATIONS, row_width
from rap_env.errors import ArtifactError

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class NetworkWeights:
    """The weights that choose blocks, float32, and what the network was kept from seeing.

    Attributes:
        first_weight: Of the first layer, (H, W).
        first_bias: Of the first layer, (H,).
        second_weight: Of the second layer, (H, H).
        second_bias: Of the second layer, (H,).
        last_weight: Of the score, (H,).
        linear_weight: Of the path from a row straight to its score, (W,).
        vectors: What each block carries, (2L, V); V = 0 for a network that serves any L.
        without: Names out of `rap_env.block_rows.ABLATIONS`.

    Raises:
        ArtifactError: The shapes do not fit together, a weight is not finite, or there is no
            such ablation.
    """

    first_weight: Floats
    first_bias: Floats
    second_weight: Floats
    second_bias: Floats
    last_weight: Floats
    linear_weight: Floats
    vectors: Floats
    without: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        hidden, width = self.hidden, row_width(self.block_vectors)
        expected = {
            "first_weight": (hidden, width),
            "first_bias": (hidden,),
            "second_weight": (hidden, hidden),
            "second_bias": (hidden,),
            "last_weight": (hidden,),
            "linear_weight": (width,),
        }
        for name, shape in expected.items():
            found = getattr(self, name).shape
            if found != shape:
                raise ArtifactError(
                    f"The policy network's {name} should have the shape {shape}, not {found}; its "
                    "file was made by another version, so export the policy again."
                )
        for name, array in self.arrays().items():
            if not np.isfinite(array).all():
                raise ArtifactError(
                    f"The policy network's {name} holds NaN or infinity; train it again."
                )
        for name in self.without:
            if name not in ABLATIONS:
                raise ArtifactError(
                    f"The policy network was trained without {name!r}, which this version does not "
                    f"know (it knows {', '.join(ABLATIONS)}); upgrade rap-env."
                )

    @property
    def hidden(self) -> int:
        """H."""
        return len(self.first_bias)

    @property
    def block_vectors(self) -> int:
        """V."""
        return int(self.vectors.shape[1]) if self.vectors.ndim == 2 else 0

    def arrays(self) -> dict[str, Floats]:
        """The arrays by name."""
        names = [entry.name for entry in fields(self) if entry.name != "without"]
        return {name: getattr(self, name) for name in names}
