"""An example of a package that brings in a policy, a method and an agent."""
