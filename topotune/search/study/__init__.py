"""The Optuna study of a search: the truth, and who may change it."""
