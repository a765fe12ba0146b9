"""A model in use: its plan, batches, generation and single blocks."""
