"""``python -m experiments.repair``: see `experiments.repair.program`."""

from experiments.launch import launch
from experiments.repair.program import repair

launch("repair", repair)
