"""Repair: fit stubs, and measure how much ΔNLL they recover."""
