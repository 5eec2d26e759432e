"""Predictions and embeddings of a trained model for many patients or notes, as parquet files.

Others import predict (the whole way from settings to the files) and settings.
"""
