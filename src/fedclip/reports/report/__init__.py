"""The HTML report: one self-contained page of a run, of several side by side, or of a bench."""
