"""``python -m experiments.small_models``: see `experiments.small_models.program`."""

from experiments.launch import launch
from experiments.small_models.program import small_lm

launch("small_lm", small_lm)
