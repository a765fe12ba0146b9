"""``python -m experiments.studies.equal_process``."""

from experiments.launch import launch
from experiments.studies.equal_process.study import STUDY

launch(STUDY.name, STUDY.run)
