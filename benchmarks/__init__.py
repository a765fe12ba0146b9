"""Benchmarks of speed and memory against a baseline in the same run: ``python -m benchmarks.NAME``.

Settings are given as ``key=value``. Each program prints a short table and writes one JSON
record to ``results/benchmarks/``; ``python -m benchmarks`` prints the table of all records.
"""
