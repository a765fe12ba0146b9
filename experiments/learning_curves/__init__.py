"""Learning curves of the trainers in ``examples/``: records and a figure."""
