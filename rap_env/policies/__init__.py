"""What chooses a plan for a request: one interface, one registry, one file format."""
