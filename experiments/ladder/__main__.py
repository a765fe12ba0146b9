"""``python -m experiments.ladder``: see `experiments.ladder.program`."""

from experiments.ladder.program import ladder
from experiments.launch import launch

launch("ladder", ladder)
