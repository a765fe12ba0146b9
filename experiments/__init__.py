"""The experiments: profile, train, evaluate, report, and demo, which shows all in a few minutes.

Each is ``python -m experiments.NAME``. Only this package imports Hydra.
"""
