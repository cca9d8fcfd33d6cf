"""The fault matrix: real searches, each hurt in one way, and what must hold afterwards.

``topotune bench faults`` prints it; ``tests/faults`` runs the same scenarios as tests.
"""
