"""Where local training happens: one client after another, or many in one pass."""
