"""torch.nn and F.scaled_dot_product_attention over clinattn.

Others import modules (torch.nn's layers) and sdpa; multihead and nested are what both share,
varlen is a part of sdpa.
"""
