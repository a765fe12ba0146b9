"""``python -m experiments.replay``: see `experiments.replay.program`."""

from experiments.launch import launch
from experiments.replay.program import replay

launch("replay", replay)
