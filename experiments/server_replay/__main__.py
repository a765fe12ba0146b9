"""``python -m experiments.server_replay``: see `experiments.server_replay.program`."""

from experiments.launch import launch
from experiments.server_replay.program import server_replay

launch("server_replay", server_replay)
