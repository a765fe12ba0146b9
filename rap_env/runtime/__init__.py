"""Serves requests on a live model whose mask follows a memory budget that moves."""
