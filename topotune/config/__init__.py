"""What a search file may say, and how it is read."""
