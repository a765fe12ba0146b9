"""Importance of blocks and items: costs of levels, greedy sequential importance (GSI), plan tables.

Artifacts (`profiles`, `level_costs`, `plan_table`) load without torch.
"""
