"""Serving systems under memory that moves: replayed arrivals, and a trial in a real cgroup."""
