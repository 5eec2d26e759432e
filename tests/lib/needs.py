"""Marks of tests that need something of this torch."""

import pytest
import torch.distributed as dist

GLOO = pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo")
