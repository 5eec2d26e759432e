"""Pretraining and fine-tuning of the encoders on packed batches: what `clinattn train` runs.

settings.py: what to run. loop.py: the Trainer. checkpoint.py: load_model, for afterwards.
"""
