"""The write-ahead spool and the MLflow adapter."""
