"""Training: what an agent learns from, sweeps, and where metrics go."""
