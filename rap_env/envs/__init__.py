"""Gymnasium environments: only the wiring of workload, memory, measurement and reward."""
