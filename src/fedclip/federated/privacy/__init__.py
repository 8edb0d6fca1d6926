"""Differential privacy: what is promised, where the noise comes from, and what has been spent."""
