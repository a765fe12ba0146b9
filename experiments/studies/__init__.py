"""Studies of calibration text: stability, overfitting and the kind of text."""
