"""Replay: several serving systems on the same arrivals under the same moving budget."""
