"""An example of a package that brings in a policy, an agent and a baseline."""
