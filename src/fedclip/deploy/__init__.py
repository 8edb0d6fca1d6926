"""Federations over several machines: keys, Flower's processes, and what connects them."""
