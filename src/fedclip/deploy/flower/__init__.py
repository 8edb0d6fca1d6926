"""Flower: its processes, its messages, its guard."""
