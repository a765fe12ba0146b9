"""Importance of blocks: one-shot scores, greedy sequential importance (GSI), the frontier.

Artifacts (`profiles`, `frontier`) load without torch.
"""
