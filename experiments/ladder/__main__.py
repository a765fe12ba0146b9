"""``python -m experiments.ladder``: see `experiments.ladder.loss_against_bytes`."""

from experiments.ladder.loss_against_bytes import STUDY
from experiments.launch import launch

launch(STUDY.name, STUDY.run)
