"""Pretraining and fine-tuning of the encoders on packed batches: what `clinattn train` runs.

Others import settings (what to run), loop (the Trainer), ranks and output (processes, the folder),
and checkpoint (load_model, for afterwards).
"""
