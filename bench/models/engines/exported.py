"""The graph that OpenVINO and ONNX Runtime are given: ids, and a mask where a load has padding."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FINITE = "sdpa_finite"


def hidden(folder: Path, masked: bool, attention: str) -> tuple[Any, tuple[Any, ...]]:
    """A module of (ids) or (ids, mask) -> hidden states, and an example of its arguments."""
    import torch
    from torch import Tensor, nn

    from engines.torch_engines import load

    if attention == FINITE:
        register_finite()

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = load(folder, "fp32", attention)

    class Masked(Hidden):
        def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
            return self.model(input_ids=ids, attention_mask=mask).last_hidden_state

    class Unmasked(Hidden):
        def forward(self, ids: Tensor) -> Tensor:
            return self.model(input_ids=ids).last_hidden_state

    ids = torch.randint(5, 50, (2, 160))
    if not masked:
        return Unmasked().eval(), (ids,)
    mask = torch.arange(160).lt(torch.tensor([[160], [60]])).long()
    return Masked().eval(), (ids, mask)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Drops what converters say on their way: warnings, log lines and progress."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    out, err = io.StringIO(), io.StringIO()
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(out):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(err):
                yield
    finally:
        logging.disable(before)


def register_finite() -> None:
    """transformers' "sdpa" with masks of large negative numbers, so that no row has no key.

    Padding beyond a window sees nothing: a softmax over -inf alone is NaN, and the next layer
    multiplies it by zero and adds it to real tokens where an engine does as the graph says.
    """
    import torch
    from torch import Tensor
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    lowest = torch.finfo(torch.float32).min / 2  # finite in bf16 too

    def mask(*args: Any, **words: Any) -> Tensor | None:
        seen = sdpa_mask(*args, **words)
        return None if seen is None else torch.where(seen, 0.0, lowest)

    AttentionInterface.register(FINITE, sdpa_attention_forward)
    AttentionMaskInterface.register(FINITE, mask)
