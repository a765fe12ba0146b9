"""``python -m experiments.small_models``: see `experiments.small_models.program`."""

from experiments.launch import launch
from experiments.small_models.program import train_small_model

launch("small_models", train_small_model)
