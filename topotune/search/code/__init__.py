"""Which code a search runs, and how it travels to a cluster."""
