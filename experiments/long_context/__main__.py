"""``python -m experiments.long_context``: see `experiments.long_context.study`."""

from experiments.launch import launch
from experiments.long_context.study import STUDY

launch(STUDY.name, STUDY.run)
