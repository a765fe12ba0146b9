"""``python -m experiments.ladder``: see `experiments.ladder.study`."""

from experiments.ladder.study import STUDY
from experiments.launch import launch

launch(STUDY.name, STUDY.run)
