"""The engine whose clients are other machines."""
