"""The coordinator of a federation."""
