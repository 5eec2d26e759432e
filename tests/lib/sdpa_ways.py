"""The two ways in which clinattn is under torch's attention, for tests of each."""

from contextlib import contextmanager

import pytest
from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

from clinattn.integrations.torch import sdpa


@contextmanager
def activated():
    sdpa.register()
    activate_flash_attention_impl("clinattn")
    try:
        yield
    finally:
        restore_flash_attention_impl()


WAYS = {"activated": activated, "block": sdpa.sdpa}
both_ways = pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
