"""From a model's name to a live model, and back to files."""
