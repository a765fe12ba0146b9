"""``python -m experiments.soak``: see `experiments.soak.program`."""

from experiments.launch import launch
from experiments.soak.program import soak

launch("soak", soak)
