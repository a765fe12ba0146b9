"""Repair: fit and distil stubs, and measure how much ΔNLL they recover."""
