"""Arithmetic of low-rank updates: no models, no rounds, no files."""
