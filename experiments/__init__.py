"""The experiments: profile, train, evaluate, report, and demo, which shows all in a few minutes.

Each is ``python -m experiments.NAME``. Only this package imports Hydra.
"""

from importlib.util import find_spec

if find_spec("hydra") is None:  # an ImportError of this name is one line after `python -m`
    message = "The experiments run in the environment of a checkout: run `make setup` there first."
    raise ImportError(message, name=__name__)
