"""Weights and their levels: packing, quantisation, and where they reside."""
