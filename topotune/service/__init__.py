"""Searches on a Ray cluster, by name: shipped, watched, stopped and fetched over Ray's Jobs API."""
