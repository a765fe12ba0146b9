"""``python -m experiments.studies.replay``: several systems under the same moving budget."""

from experiments.launch import launch
from experiments.studies.replay.study import STUDY

launch(STUDY.name, STUDY.run)
