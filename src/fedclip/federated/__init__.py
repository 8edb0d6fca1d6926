"""The round loop: what a client does, how updates are folded, who takes part."""
