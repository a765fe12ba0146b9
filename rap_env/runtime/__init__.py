"""A policy on a live model: masks for requests as they come, within memory that moves."""
