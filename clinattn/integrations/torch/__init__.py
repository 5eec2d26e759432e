"""torch.nn and F.scaled_dot_product_attention over clinattn.

Others import modules (torch.nn's layers), linear (nn.Linear) and sdpa; multihead and nested are
what modules and sdpa share, varlen is a part of sdpa.
"""
