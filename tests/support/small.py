"""A CLIP of two towers like `tiny`, a sixteenth as large, whose weights are random."""

from pathlib import Path

SMALL = f"random:{Path(__file__).parent / 'files' / 'small'}"
