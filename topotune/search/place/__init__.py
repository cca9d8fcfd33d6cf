"""Where a search lies, and who drives it."""
