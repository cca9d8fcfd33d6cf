"""The outbox of a search and the MLflow adapter."""
