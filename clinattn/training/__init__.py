"""Pretraining and fine-tuning of the encoders on packed batches: what `clinattn train` runs.

Others import settings (what to run), fields (how settings are written), masking, loop (the
Trainer), ranks, output and interruption (processes, the folder, signals), and for afterwards
checkpoint (load_model), origin (what a CHECKPOINT names), and start, corpus, moments and cuts (of
timelines), reading, sequences, data, windows and batches: what a checkpoint's model is given.
"""
