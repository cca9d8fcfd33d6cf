"""The decisions of a search, without Ray."""
