"""Live language models: the only package that knows the internals of transformers.

Import what you need from its modules; each loads torch, and most load transformers on first use.
"""
