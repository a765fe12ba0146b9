"""Recall and loss over the length of the context, under uniform cache settings and policies."""
