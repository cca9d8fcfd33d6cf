"""Toroidal continuous equilibrium propagation: networks that relax, and learn by being nudged."""
