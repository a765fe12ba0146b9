"""A study of how the costs of levels, and plans made from them, depend on the calibration text."""
