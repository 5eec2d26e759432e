"""Export of a trained model: a folder with its card, and a program of torch.export.

Others import export (the whole way from settings to what was written), program and settings.
"""
