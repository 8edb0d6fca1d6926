"""Fair comparisons: a grid of runs, tuned alike, measured alike, in one table."""
