"""``python -m experiments.long_context``: see `experiments.long_context.program`."""

from experiments.launch import launch
from experiments.long_context.program import long_context

launch("long_context", long_context)
