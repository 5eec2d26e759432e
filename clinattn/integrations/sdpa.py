"""The public path of integrations.torch.sdpa."""

from clinattn.integrations.torch.sdpa import register, sdpa

__all__ = ["register", "sdpa"]
