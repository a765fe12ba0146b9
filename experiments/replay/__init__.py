"""Replay: the same arrivals under the same moving budget for several serving systems."""
