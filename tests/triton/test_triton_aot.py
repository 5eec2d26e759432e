"""The shipped Triton configurations as compiled for cards that need not be here."""

import itertools
import os

import pytest
import torch
from support import dtype_id

pytest.importorskip("triton")

from aot import SUMMARY, VARIANTS, problems  # noqa: E402

from clinattn.backends.call import Arguments  # noqa: E402
from clinattn.kernels import forward  # noqa: E402
from clinattn.tools.compiled.kernel_report import CARDS, KINDS, captured_launches  # noqa: E402

VALUES = [name for name in VARIANTS if name.startswith("values-")]
# Every row of the configuration tables, and the other ways into the kernels on one card.
QUICK = [
    *itertools.product(CARDS, (64, 128, 256), ("bfloat16", "float32"), KINDS),
    *itertools.product((90,), (64, 128), ("bfloat16",), [x for x in VARIANTS if x not in KINDS]),
    *itertools.product((90,), (64, 128, 256), ("float16",), ("plain",)),
    *itertools.product(CARDS, (64, 192), ("bfloat16", "float32"), VALUES),
    *itertools.product(CARDS, (64, 128, 256), ("bfloat16", "float32"), (f"{SUMMARY}plain",)),
    *itertools.product(
        (80, 90), (64, 128), ("bfloat16",), (f"{SUMMARY}pairs", f"{SUMMARY}terms")
    ),
]
EVERY = itertools.product(
    CARDS,
    (16, 64, 128, 256),
    ("bfloat16", "float16", "float32"),
    [*VARIANTS, *(SUMMARY + variant for variant in VARIANTS)],
)
# CLINATTN_TESTS=every compiles every variant: an hour.
JOBS = list(EVERY if os.environ.get("CLINATTN_TESTS") == "every" else QUICK)


def job_id(job):
    return "sm{}-dim{}-{}-{}".format(*job)


@pytest.mark.parametrize("job", JOBS, ids=job_id)
def test_kernel(job):
    assert not problems(job)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=dtype_id)
def test_grid_has_one_axis(dtype, monkeypatch):
    """Axes two and three end at 65535; batch times heads does not."""
    q = torch.empty(1, dtype=dtype).expand(70_000, 2, 3, 16)
    with captured_launches(90) as launches:
        forward.attention_forward(Arguments(q, q, q))
    ((_, keywords),) = launches
    assert keywords["grid"] == (140_000,)
