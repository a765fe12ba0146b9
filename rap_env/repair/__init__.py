"""Repair: a small stub in the place of a removed block. Importing it does not import torch."""
