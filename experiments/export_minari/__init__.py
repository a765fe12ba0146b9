"""``python -m experiments.export_minari``: see `experiments.export_minari.episodes`."""
