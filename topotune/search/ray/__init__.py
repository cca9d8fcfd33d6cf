"""The part that runs on Ray: sessions, workers, and what Tune asks for."""
