"""``python -m experiments.repair``: see `experiments.repair.study`."""

from experiments.launch import launch
from experiments.repair.study import STUDY

launch(STUDY.name, STUDY.run)
