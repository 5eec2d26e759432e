"""The block in which attention is that of whole sequences, and shards of tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.overrides import TorchFunctionMode

from clinattn.operator import split
from clinattn.operator.words.checks import check_tensor
from clinattn.operator.words.scalars import as_flag, as_int
from clinattn.parallel.processes import Processes

OTHERS = {
    F.scaled_dot_product_attention,
    F.multi_head_attention_forward,
    torch._native_multi_head_attention,
    torch._transformer_encoder_layer_fwd,
}


@contextmanager
def context_parallel(mesh: DeviceMesh, *, gathered: bool = False) -> Iterator[None]:
    """Within the block, attention is that of sequences whose tokens are split over processes.

    mesh: one-dimensional, mesh["sequence"] of a larger one; on the CPU over gloo, on GPUs over
    nccl. Each process has the tokens that follow those of the process before, in any number, none
    included: shard() gives nearly equal shares.
    gathered: collects all keys that a process's queries see before it attends to them, in memory
    that grows with the whole sequence. Default False: layers with a window on both sides still do,
    as it holds their halo alone, and others take the keys of one process after the other.

    Inside, fused_attention, fused_attention_varlen and all that calls them take tensors of tokens
    as shards: query, key, value, times, and the ids, positions and labels of an encoder. What is
    said of sequences is said of whole ones, by all processes alike: cu_seqlens, max_seqlen,
    kv_lengths, q_lengths, window, global_prefix. Positions are the whole sequence's: those of
    clinattn's encoders are by themselves; a model of others needs its position_ids as a shard.
    The backward pass belongs into the block, too, as layers may be recomputed in it; all processes
    run it. Gradients are those of the sum of the losses of all processes: their mean over
    processes, which DistributedDataParallel takes, is that of the mean loss.

    Results are those of one process within rounding. With a window, or gathered, o and lse have its
    bits on the compiled CPU kernels, without a global_prefix. dk and dv are summed over processes.

    Raises TypeError or ValueError for another mesh, for a block inside a block, and where processes
    make different calls or change their number of tokens within a block; NotImplementedError for
    what is not served: attn_mask, segment_ids, dropout_p, time_decay, alibi_slopes, relative_bias,
    cross-attention, nested tensors, second derivatives, torch.export. After an error in one
    process alone the others wait until the timeout of their group, as in torch's collectives.
    Follows Liu et al., Ring Attention (2023), and halo exchange of stencil codes.
    """
    from clinattn.parallel.calls import SplitCalls  # a dozen modules, of which few calls have need

    gathered = as_flag("gathered", gathered)
    processes = Processes(mesh)
    if split.active is not None:
        raise ValueError("context_parallel: entered inside another one, expected one at a time")
    split.active = SplitCalls(processes, gathered)
    try:
        with RefusesOthers():
            yield
    finally:
        split.active = None


class RefusesOthers(TorchFunctionMode):
    """Refuses torch's own attention, which would see the part of this process for the whole."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function in OTHERS:
            raise NotImplementedError(
                f"{function.__name__}: torch's own attention inside context_parallel would see the "
                "part of this process for the whole sequence; call clinattn.fused_attention, or "
                "replace a model's attention by clinattn.replace_attention"
            )
        return function(*args, **(kwargs or {}))


def shard(mesh: DeviceMesh, x: Tensor, dim: int = 0) -> Tensor:
    """Returns the part of x along dim for this process, as a view.

    Of N tokens the first N % P processes get one more than the others. Raises as context_parallel
    does for the mesh, TypeError for what is no tensor, ValueError for a dimension that x has not.
    """
    processes, dim = Processes(mesh), _dimension(x, dim)
    return x.tensor_split(processes.size, dim)[processes.rank]


def gather(mesh: DeviceMesh, x: Tensor, dim: int = 0) -> Tensor:
    """Returns the parts of all processes along dim, in order, in each; without a gradient.

    The parts may differ in size along dim alone. Raises as shard does.
    """
    processes, dim = Processes(mesh), _dimension(x, dim)
    return processes.gathered(x, dim, processes.said(x.shape[dim]))


def _dimension(x: Tensor, dim: int) -> int:
    check_tensor("x", x)
    dim = as_int("dim", dim)
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim: got {dim} for x of shape {tuple(x.shape)}")
    return dim % x.dim()
