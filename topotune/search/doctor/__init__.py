"""What ``topotune doctor`` and a search look at before anything starts."""
