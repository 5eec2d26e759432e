"""The masks of transformers, as intervals where they are some, else dense.

transformers describes a mask by a function of indices. Those that it makes of causal, window and
packed documents come back as a PatternMask: memory stays O(N), and the mask, not the keywords of
some layer, says what is visible, as it does for transformers' own eager attention. Any other
becomes dense. Where torch is tracing, a mask of the keys alone, (B, 1, 1, K), has the rest of the
pattern as an attribute: a copy of that one has lost it, which attention() refuses.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import masking_utils

from clinattn.integrations.transformers.pattern_mask import Pattern, PatternMask, made

ATTRIBUTE = "_clinattn_pattern"
# Models whose own attention adds to scores what the registered mask function gives, True and all.
ADDED = {
    "bigbird_pegasus": "its encoder adds the masks of the implementation that its decoder asks for "
    "to scores; expected attn_implementation='eager'"
}


def parts_of(mask: Tensor) -> tuple[Tensor, Pattern | None]:
    """A plain mask, and the pattern to intersect it with if it is one of the keys, made here."""
    if not isinstance(mask, PatternMask):
        return mask, getattr(mask, ATTRIBUTE, None)
    return (mask.keys, mask.pattern) if mask.complete is None else (mask.complete, None)


def _code(name: str, *args: Any) -> Any:
    """The code of the functions that a factory of transformers makes; None without the factory."""
    factory = getattr(masking_utils, name, None)
    return None if factory is None else factory(*args).__code__


# True in 5.0: later releases hand a length and an offset in place of the positions of queries.
_BY_POSITION = "cache_position" in inspect.signature(masking_utils.sdpa_mask).parameters
_CAUSAL = masking_utils.causal_mask_function
_BIDIRECTIONAL = getattr(masking_utils, "bidirectional_mask_function", None)
_AND = _code("and_masks", _CAUSAL)
_SAME_DOCUMENT = _code("packed_sequence_mask_function", torch.zeros(1, 1))
_WITHIN_DOCUMENT = _code("remap_positions_for_packed_sequence", _CAUSAL, torch.zeros(1, 1))


def _enclosed(function: Callable, code: Any) -> tuple[Any, ...] | None:
    """Closure of a function of this code, in the order of the names; None for other functions."""
    if code is None or getattr(function, "__code__", None) is not code:
        return None
    return tuple(cell.cell_contents for cell in function.__closure__ or ())


def _documents(function: Callable) -> tuple[Tensor, Callable] | None:
    """(segment ids, what is visible within one) of a mask of packed documents."""
    parts = _enclosed(function, _AND)
    if parts is None or len(parts[0]) != 2:
        return None
    for same, within in (parts[0], reversed(parts[0])):  # as earlier and later releases join them
        ids = _enclosed(same, _SAME_DOCUMENT)
        # transformers 5.0 leaves the places as they are, which within a document is the same
        inner = (within,) if _WITHIN_DOCUMENT is None else _enclosed(within, _WITHIN_DOCUMENT)
        if ids is not None and inner is not None:
            return ids[0], inner[0]
    return None


def _pattern(
    function: Callable,
    config: Any,
    window: int | None,
    causal_skip: bool,
    bidirectional_skip: bool,
) -> Pattern | None:
    """Pattern that a mask function stands for; None where the pattern is not known.

    transformers lets attention leave out a mask (the skips) unless a layer is going to change it,
    or it has other parts; window is then that of its own factories.
    """
    if not (causal_skip or bidirectional_skip):
        return None
    if window is None:
        if function is _CAUSAL:
            return Pattern(right=0)
        return Pattern() if function is _BIDIRECTIONAL else None
    if window != getattr(config, "sliding_window", None) or hasattr(config, "attention_chunk_size"):
        return None  # that of chunked attention has the same name
    return Pattern(window - 1, 0) if causal_skip else Pattern(window, window)


def _span(positions: Tensor) -> tuple[Any, Any]:
    """(length, first) of positions that follow one another; tensors where they may not be read.

    Reading positions from a GPU makes the host wait: once for each mask of a forward pass.
    """
    captured = positions.is_cuda and torch.cuda.is_current_stream_capturing()
    if _is_watched(positions) or captured or (positions.diff() != 1).any():
        return len(positions), positions
    return len(positions), int(positions[0])


def attention_mask(
    batch_size: int,
    q_length: Any = None,
    kv_length: int = 0,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Callable = _CAUSAL,
    attention_mask: Tensor | None = None,
    *,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    config: Any = None,
    device: torch.device | str = "cpu",
    cache_position: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The mask function that is registered; see transformers' AttentionMaskInterface.

    Queries are counted by q_length and q_offset, or by their places among the keys in
    cache_position, (q_length,).

    Returns a bool mask, True = visible, (batch_size, 1, q_length, kv_length): a PatternMask where
    it is one, and (batch_size, 1, 1, kv_length) with its Pattern where torch is tracing. Raises
    NotImplementedError for a model that would read the mask otherwise.
    """
    if getattr(config, "model_type", None) in ADDED:
        raise NotImplementedError(f"{config.model_type}: {ADDED[config.model_type]}")
    segment_ids = pattern = None
    if cache_position is not None:
        device = cache_position.device
        q_length, q_offset = _span(cache_position)
    lengths = (q_length, kv_length, q_offset, kv_offset)
    # Static caches count in tensors, which nobody may read in the middle of a graph.
    if not use_vmap and all(isinstance(x, int | torch.SymInt) for x in lengths):
        # Nor does a compiler let a function be looked into.
        packed = None if torch.compiler.is_compiling() else _documents(mask_function)
        if packed:
            segment_ids, within = packed
            pattern = _pattern(within, config, local_size, True, False)
        else:
            skips = (allow_is_causal_skip, allow_is_bidirectional_skip)
            pattern = _pattern(mask_function, config, local_size, *skips)
    if pattern is None or (segment_ids is not None and q_length != kv_length):
        mask = masking_utils.sdpa_mask(
            batch_size=batch_size,
            kv_length=kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            allow_is_bidirectional_skip=False,
            use_vmap=use_vmap,
            config=config,
            device=device,
            **_queries(q_length, q_offset, cache_position, device),
            **kwargs,
        )
        assert mask is not None
        return mask
    keys = _keys(attention_mask, batch_size, kv_length, kv_offset, device)
    pattern = pattern._replace(
        offset=q_offset - kv_offset, segment_ids=segment_ids, padded=attention_mask is not None
    )
    if not _is_watched(keys):
        return made(keys, q_length, *pattern[:5])
    setattr(keys, ATTRIBUTE, pattern)
    return keys


def _queries(
    length: Any, offset: Any, positions: Tensor | None, device: torch.device | str
) -> dict[str, Any]:
    """The words that tell the installed transformers which queries a mask is for."""
    if not _BY_POSITION:
        if positions is not None and offset is positions:
            raise ValueError(
                "cache_position: expected consecutive positions outside of a graph; this release "
                "of transformers takes q_length and q_offset for others"
            )
        return {"q_length": length, "q_offset": offset}
    if positions is None:
        positions = torch.arange(length, device=device) + offset
    return {"cache_position": positions}


def _is_watched(x: Tensor) -> bool:
    """True under a trace or a transform, for which a mask is made of plain tensors."""
    return (
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or type(x) is not Tensor
        or torch._C._are_functorch_transforms_active()
    )


def _keys(
    mask: Tensor | None, batch: int, length: int, offset: int, device: torch.device | str
) -> Tensor:
    """(B, 1, 1, length) of a 2-D mask; keys past its end are hidden."""
    if mask is None:
        return torch.ones(batch, 1, 1, length, dtype=torch.bool, device=device)
    keys = mask[:, offset : offset + length].bool()
    if keys.shape[1] < length:
        keys = torch.nn.functional.pad(keys, (0, length - keys.shape[1]), value=False)
    return keys[:, None, None]
