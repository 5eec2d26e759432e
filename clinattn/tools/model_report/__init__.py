"""A model of transformers before and after replace_attention: `clinattn report-model`.

Others import settings and report; parity compares two models, architectures and source make them,
and example_inputs makes their batches.
"""
