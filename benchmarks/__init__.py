"""Benchmarks that time this library against hand-written loops and against other packages, in one run."""
