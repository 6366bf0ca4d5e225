"""Benchmarks of the ops, physical floors, and what a kernel costs before it ever runs."""
