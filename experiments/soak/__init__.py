"""Soak test: a server under thousands of valid and invalid requests and a moving budget."""
