"""Ray Tune and Optuna behind one driver."""
