"""Training of agents: score model, score tables, sweeps and loggers."""
