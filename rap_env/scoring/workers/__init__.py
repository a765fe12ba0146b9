"""Scoring on several workers: Ray actors that each hold the model (needs the extra ``ray``)."""
