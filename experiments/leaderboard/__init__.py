"""``python -m experiments.leaderboard``: check entries of the leaderboard, or publish our own."""
