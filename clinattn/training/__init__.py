"""Pretraining and fine-tuning of the encoders on packed batches: what `clinattn train` runs.

Others import settings (what to run), fields (how settings are written), masking, loop (the
Trainer), ranks and output (processes, the folder), and checkpoint (load_model, for afterwards).
"""
