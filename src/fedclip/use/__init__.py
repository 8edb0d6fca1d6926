"""A finished run put to use: predictions, a server, a card."""
