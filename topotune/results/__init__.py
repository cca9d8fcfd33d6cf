"""Leaderboard, plots and export; reads records only."""
