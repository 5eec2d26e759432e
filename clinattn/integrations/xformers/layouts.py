"""xformers' three layouts, (B, M, K), (B, M, H, K) and (B, M, G, H, K), as the second of them."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from clinattn.operator.words.checks import check_tensor

NAMES = {
    3: "(batch, tokens, head_dim)",
    4: "(batch, tokens, heads, head_dim)",
    5: "(batch, tokens, groups, heads, head_dim)",
}


class HeadLayout(NamedTuple):
    """heads_of_query: those between tokens and head_dim, () (H,) or (G, H)."""

    heads_of_query: tuple[int, ...]

    @property
    def dims(self) -> int:
        return 3 + len(self.heads_of_query)

    def heads(self, query: Tensor, *keys: Tensor) -> tuple[Tensor, ...]:
        """All as (B, M, heads, K); heads that were expanded are taken once, and shared."""
        if self.dims == 3:
            return tuple(x[:, :, None] for x in (query, *keys))
        if self.dims == 4:
            return query, *keys
        shared = all(x.shape[3] == 1 or x.stride(3) == 0 for x in keys)
        if shared:
            keys = tuple(x[:, :, :, :1] for x in keys)
        else:
            keys = tuple(x.expand(*x.shape[:3], query.shape[3], x.shape[4]) for x in keys)
        return tuple(x.flatten(2, 3) for x in (query, *keys))

    def bias(self, bias: Tensor) -> Tensor:
        """A tensor of as many dimensions as query, as (B, heads, Mq, Mk)."""
        check_tensor("attn_bias", bias)
        if bias.dim() != self.dims:
            raise ValueError(
                f"attn_bias: got shape {tuple(bias.shape)}, expected {self.dims} dimensions as in "
                "query: batch, heads if it has them, queries and keys"
            )
        if not bias.is_floating_point():
            raise TypeError(f"attn_bias: got {bias.dtype}, expected floats to add to the scores")
        if self.dims == 3:
            return bias[:, None]
        if self.dims == 5:
            if bias.shape[1:3] != (1, 1):
                bias = bias.expand(-1, *self.heads_of_query, -1, -1)
            return bias.flatten(1, 2)
        return bias

    def results(self, o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """(B, M, heads, K) and (B, heads, M) in this layout; lse keeps a head where o has none."""
        if self.dims == 3:
            return o[:, :, 0], lse
        if self.dims == 4:
            return o, lse
        return o.unflatten(2, self.heads_of_query), lse.unflatten(1, self.heads_of_query)


def layout_of(query: Any, key: Any, value: Any) -> HeadLayout:
    """Raises TypeError or ValueError unless the three fit together."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_tensor(name, x)
        if x.dim() not in NAMES or x.dim() != query.dim():
            expected = NAMES.get(query.dim(), ", ".join(NAMES.values()))
            raise ValueError(f"{name}: got shape {tuple(x.shape)}, expected {expected}")
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"key: got head_dim {key.shape[-1]}, expected that of query, {query.shape[-1]}"
        )
    if key.shape[:2] != value.shape[:2]:
        raise ValueError(
            f"value: got {tuple(value.shape[:2])} batch and tokens, expected those of key, "
            f"{tuple(key.shape[:2])}"
        )
    heads = tuple(query.shape[2:-1])
    served = (heads, (*heads[:-1], 1)) if len(heads) == 2 else (heads,)
    for name, x in (("key", key), ("value", value)):
        if x.shape[0] != query.shape[0]:
            raise ValueError(
                f"{name}: got batch size {x.shape[0]}, expected that of query, {query.shape[0]}"
            )
        if tuple(x.shape[2:-1]) not in served:
            raise ValueError(
                f"{name}: got heads {tuple(x.shape[2:-1])}, expected those of query, {heads}"
            )
    return HeadLayout(heads)
