"""``python -m experiments.replay``: see `experiments.replay.study`."""

from experiments.launch import launch
from experiments.replay.study import STUDY

launch(STUDY.name, STUDY.run)
