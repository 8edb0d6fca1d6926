"""What travels between a coordinator and its sites, as bytes."""
