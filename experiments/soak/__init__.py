"""Soak test: a server under thousands of good and bad requests and a moving budget."""
