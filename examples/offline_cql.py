"""Discrete CQL of d3rlpy on a Minari dataset of a pinned task, without a single step of it.

    pip install "minari[hdf5]" d3rlpy
    PYTHONPATH=. python examples/offline_episodes.py   # writes the dataset
    python examples/offline_cql.py

d3rlpy knows arrays, not dictionaries: an observation is flattened, and the Q function, which sees
each item in the same way, takes it apart again. Its values of invalid actions are far below all
others, so that neither the maximum nor the conservative loss counts them.
"""

from __future__ import annotations

import d3rlpy
import minari
import numpy as np
import torch
from d3rlpy.models.encoders import VectorEncoderFactory
from d3rlpy.models.q_functions import QFunctionFactory
from d3rlpy.models.torch import DiscreteMeanQFunctionForwarder, DiscreteQFunction, QFunctionOutput
from torch import nn

import rap_env

TASK = "RAPLadder/SmolLM2-Table-v1"
DATASET = "rapladder/smollm2-table/mixed-v0"
UPDATES, BATCH, LEARNING_RATE, ALPHA = 800, 64, 3e-3, 4.0
KEYS = ("ladder", "request", "action_mask")
INVALID = -1e3


class ItemQ(DiscreteQFunction):
    """The value of each item from its row, the request, and the mean over all items."""

    def __init__(self, shapes: tuple[tuple[int, ...], ...], hidden: int = 32) -> None:
        super().__init__()
        self.shapes = shapes
        (_, columns), (request,), _ = shapes
        self.row = nn.Sequential(nn.Linear(columns + request, hidden), nn.Tanh())
        self.score = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.Tanh(), nn.Linear(hidden, 1))

    def forward(self, flat: torch.Tensor) -> QFunctionOutput:
        """Values (B, N) of flat observations."""
        parts = flat.split([int(np.prod(shape)) for shape in self.shapes], dim=1)
        ladder, request, mask = (p.unflatten(1, s) for p, s in zip(parts, self.shapes, strict=True))
        request = request[:, None].expand(-1, ladder.shape[1], -1)
        rows = self.row(torch.cat([ladder, request], dim=-1))
        mean = rows.mean(dim=1, keepdim=True).expand_as(rows)
        values = self.score(torch.cat([rows, mean], dim=-1))[..., 0]
        return QFunctionOutput(values.masked_fill(mask == 0, INVALID), None, None)

    @property
    def encoder(self) -> nn.Module:
        """What comes before the values; nothing here."""
        return self.row


class ItemQFactory(QFunctionFactory):
    """Makes `ItemQ` in the place of d3rlpy's own Q functions."""

    def __init__(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.shapes = shapes

    def create_discrete(self, encoder: nn.Module, hidden_size: int, action_size: int) -> tuple:
        """The Q function, and what computes its errors."""
        values = ItemQ(self.shapes)
        return values, DiscreteMeanQFunctionForwarder(values, action_size)

    @staticmethod
    def get_type() -> str:
        """The name under which d3rlpy would save it."""
        return "items"


def flat(observation: dict) -> np.ndarray:
    """The arrays of observations (T, ...) as one array (T, D)."""
    parts = [np.asarray(observation[key], dtype=np.float32) for key in KEYS]
    return np.concatenate([part.reshape(len(part), -1) for part in parts], axis=1)


class Agent:
    """Takes the valid action of the highest value."""

    def __init__(self, algorithm: d3rlpy.algos.DiscreteCQL) -> None:
        self.algorithm = algorithm

    def predict(self, observation: dict, deterministic: bool = True) -> tuple[int, None]:
        """The action for one observation, as `rap_env.evaluate` asks for it."""
        one = flat({key: value[None] for key, value in observation.items()})
        return int(self.algorithm.predict(one)[0]), None


def train(dataset: str = DATASET, updates: int = UPDATES, seed: int = 0) -> Agent:
    """An agent that learned values from the episodes of a dataset."""
    d3rlpy.seed(seed)
    torch.set_num_threads(1)
    episodes = list(minari.load_dataset(dataset).iterate_episodes())
    shapes = tuple(episodes[0].observations[key].shape[1:] for key in KEYS)
    lengths = [len(episode.actions) for episode in episodes]
    data = d3rlpy.dataset.MDPDataset(
        observations=np.concatenate([flat(e.observations)[:-1] for e in episodes]),
        actions=np.concatenate([e.actions for e in episodes]),
        rewards=-np.log1p(-np.concatenate([e.rewards for e in episodes]).clip(max=0.0)),
        terminals=np.concatenate([np.arange(n) == n - 1 for n in lengths]).astype(np.float32),
        action_space=d3rlpy.ActionSpace.DISCRETE,
        action_size=shapes[0][0],
    )
    algorithm = d3rlpy.algos.DiscreteCQLConfig(
        learning_rate=LEARNING_RATE,
        batch_size=BATCH,
        gamma=1.0,
        alpha=ALPHA,
        target_update_interval=100,
        encoder_factory=VectorEncoderFactory([1]),  # made by d3rlpy, and not used
        q_func_factory=ItemQFactory(shapes=shapes),
    ).create()
    algorithm.build_with_dataset(data)
    agent = Agent(algorithm)
    for _ in range(updates):
        algorithm.update(data.sample_transition_batch(BATCH))
    return agent


if __name__ == "__main__":
    print(rap_env.evaluate(train(updates=0), TASK, name="untrained"), end="\n\n")
    print(rap_env.evaluate(train(), TASK, name="discrete CQL"))
