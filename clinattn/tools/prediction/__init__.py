"""Predictions and embeddings of a trained model for many patients or notes, as parquet files.

Others import settings, job (what is predicted, by what), predict (its run) and printed.
"""
