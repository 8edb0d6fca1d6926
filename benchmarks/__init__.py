"""Benchmarks: each prints a table and writes its result file."""
