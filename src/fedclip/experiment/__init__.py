"""A run, from a configuration to a finished folder; read run.py first."""
