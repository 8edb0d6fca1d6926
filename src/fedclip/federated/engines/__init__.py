"""Who carries the clients of a round out."""
