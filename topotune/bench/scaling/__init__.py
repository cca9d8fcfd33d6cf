"""Measures how a search scales with workers."""
