"""The experiments: profile, train, evaluate, report, and demo, which runs the four in one go.

Each is ``python -m experiments.NAME``. Only this package imports Hydra.
"""
