"""Small language models that are trained from scratch in minutes."""
