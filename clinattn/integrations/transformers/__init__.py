"""transformers over clinattn; needs that package.

    clinattn.integrations.transformers.register()
    model = AutoModel.from_pretrained(folder, attn_implementation="clinattn")

Others import register from here. registry, masks and pattern_mask serve models that ask the
registry of attention functions; around_linear and stream are for replaced linear layers; each
other file is a family with attention of its own.
"""

from clinattn.integrations.transformers.registry import register

__all__ = ["register"]
