"""``python -m experiments.server_replay``: see `experiments.server_replay.study`."""

import signal
import sys

from experiments.launch import launch
from experiments.server_replay.study import STUDY

signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # or its server stays
launch(STUDY.name, STUDY.run)
