"""Products and bf16 in Triton's interpreter as the hardware has them; importing this makes it so.

numpy has no bf16: the interpreter keeps the bits in uint16, multiplies these as integers, and cuts
fp32 to bf16 where the hardware rounds. On some processors numpy's products of fp32 round a row by
its place in the matrix; here products are computed in fp64, so that a score has the same bits in
every tile.
"""

import numpy
import torch
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

cast_others, dot_others = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot


def cast(self, x, dtype):
    source, target = x.dtype.scalar, dtype.scalar
    values = torch.from_numpy(x.data.copy()) if tl.bfloat16 in (source, target) else None
    if source == tl.bfloat16 and target == tl.float32:
        return TensorHandle(values.view(torch.bfloat16).float().numpy(), target)
    if source == tl.float32 and target == tl.bfloat16:
        return TensorHandle(values.bfloat16().view(torch.uint16).numpy(), target)
    return cast_others(self, x, dtype)


def dot(self, a, b, start, *rest):
    a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    if a.dtype.scalar not in (tl.float32, tl.float16):
        return dot_others(self, a, b, start, *rest)
    x, y, total = (z.data.astype(numpy.float64) for z in (a, b, start))
    return TensorHandle((x @ y + total).astype(numpy.float32), start.dtype.scalar)


InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast, dot
InterpreterBuilder.create_fp_to_fp = lambda self, x, dtype, rounding: cast(self, x, dtype)
