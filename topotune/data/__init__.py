"""Data sets as tensors, three disjoint splits each."""
