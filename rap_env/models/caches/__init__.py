"""KV caches, their levels, and attention over them."""
