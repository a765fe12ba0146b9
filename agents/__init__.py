"""Agents that learn which blocks to remove, and the baselines they are compared with."""
