"""Benchmarks that print the figures of the docs."""
