"""``python -m experiments.server_replay``: see `experiments.server_replay.program`."""

import signal
import sys

from experiments.launch import launch
from experiments.server_replay.program import server_replay

signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or its server stays
launch("server_replay", server_replay)
