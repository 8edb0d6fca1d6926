"""The HTTP interface of a trained adapter."""
