"""Small language models, trained from scratch in minutes."""
