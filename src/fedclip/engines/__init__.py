"""Where local training happens: one client after another, or elsewhere."""
