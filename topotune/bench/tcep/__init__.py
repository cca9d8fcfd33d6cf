"""Measures TCEP: gradients, memory, solvers and accuracy."""
