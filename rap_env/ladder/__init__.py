"""Ladders: the items of a model that may be lowered, their levels, bytes and observation."""
