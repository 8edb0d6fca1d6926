"""A site of a federation."""
