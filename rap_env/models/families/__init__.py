"""Supported model families, the place of the blocks in them, and placeholders for blocks."""
