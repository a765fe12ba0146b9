"""Repair: fit and distil stubs, and measure what they recover."""
