"""Many clients' adapters on one CLIP, in one pass."""
