"""A model as a program of torch.export: with the ops of clinattn, or of plain torch."""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from clinattn.encoder import EncoderConfig, SequenceClassifier
from clinattn.files.disk import written_whole

OURS = "clinattn"  # namespace of the ops
MOST = 1 << 20  # sequences, and tokens where positions are no table


class Program(nn.Module):
    """Tensors alone in and out: the logits of a model."""

    def __init__(self, model: nn.Module, config: EncoderConfig):
        super().__init__()
        self.model, self.config = model, config

    def given(self, *extras: Tensor) -> dict[str, Tensor]:
        """The words by which the model takes the extra inputs, in the order of `extras_of`."""
        return dict(zip(extras_of(self.config), extras, strict=True))


class Packed(Program):
    """Sequences end to end: inputs (T,), cu_seqlens int32 (S + 1,), and extras (T,)."""

    def forward(self, inputs: Tensor, cu_seqlens: Tensor, *extras: Tensor) -> Tensor:
        # a program of two sequences or more serves one, too: an empty one stands behind the last
        ends = torch.cat((cu_seqlens, cu_seqlens[-1:]))
        logits = self.model(inputs, cu_seqlens=ends, **self.given(*extras)).logits
        return logits[:-1] if isinstance(self.model, SequenceClassifier) else logits


class Padded(Program):
    """A batch: inputs (B, N), lengths (B,), and extras (B, N)."""

    def forward(self, inputs: Tensor, lengths: Tensor, *extras: Tensor) -> Tensor:
        words = self.given(*extras)
        return self.model(inputs, lengths=lengths, layout="padded", **words).logits


def extras_of(config: EncoderConfig) -> tuple[str, ...]:
    """Inputs that an encoder asks for beside its tokens."""
    found = {"positions": config.positions == "rotary_time", "values": config.numeric_values}
    return tuple(name for name, asked in found.items() if asked)


def packs(config: EncoderConfig, plain: bool) -> bool:
    """Sequences come end to end. A learned table of positions bounds the whole, if they do."""
    return not plain and config.positions != "learned"


def signature(config: EncoderConfig, plain: bool) -> str:
    """The arguments of a program, in words."""
    if packs(config, plain):
        first = "input_ids int64 (T,), cu_seqlens int32 (S + 1,)"
        shape = "(T,)"
    else:
        first = "input_ids int64 (B, N), lengths int64 (B,)"
        shape = "(B, N)"
    kinds = {"positions": "days, float64", "values": "float32, NaN for none,"}
    return ", ".join([first, *(f"{name} {kinds[name]} {shape}" for name in extras_of(config))])


def example(config: EncoderConfig, plain: bool) -> tuple[Tensor, ...]:
    """Arguments for two short sequences; made-up ids, and no data."""
    lengths = torch.tensor([3, 5])
    shape: tuple[int, ...] = (8,) if packs(config, plain) else (2, 5)
    ids = torch.arange(torch.Size(shape).numel()).remainder(config.vocab_size).view(shape)
    extras = {
        "positions": torch.arange(ids.numel(), dtype=torch.float64).view(shape),
        "values": torch.zeros(shape),
    }
    where = torch.tensor([0, 3, 8], dtype=torch.int32) if packs(config, plain) else lengths
    return ids, where, *(extras[name] for name in extras_of(config))


def exported(model: nn.Module, config: EncoderConfig, plain: bool) -> ExportedProgram:
    """The program of a model in eval mode, for any number of sequences of any length.

    config: of the model. plain: attention is torch's, on padded sequences, and no op is of
    clinattn; the model must be one of attention="sdpa". Raises RuntimeError where one is left.
    """
    inputs = example(config, plain)
    program = (Packed if packs(config, plain) else Padded)(model, config).eval()
    size = config.max_positions - config.position_offset if config.positions == "learned" else MOST
    rows: Any
    if packs(config, plain):
        tokens = Dim("tokens", min=2, max=MOST)
        rows, ends = {0: tokens}, {0: Dim("ends", min=2, max=MOST)}
    else:
        batch, least = Dim("sequences", min=1, max=MOST), 2 + config.global_prefix
        rows, ends = {0: batch, 1: Dim("tokens", min=least, max=size)}, {0: batch}
    extras = tuple(rows for _ in extras_of(config))
    shapes = (rows, ends, extras) if extras else (rows, ends)
    # else a program of several sequences is none of one
    tracing: Any = import_module("torch.fx.experimental._config")
    with (
        torch.no_grad(),
        warnings.catch_warnings(),
        tracing.patch(backed_size_oblivious=packs(config, plain)),
    ):
        warnings.simplefilter("ignore", FutureWarning)  # of torch about itself
        found = torch.export.export(program, inputs, dynamic_shapes=shapes, strict=False)
        if not plain:
            return found
        found = found.run_decompositions({torch.ops.clinattn.rotary.default: plain_rotary})
    if left := ours_in(found):
        raise RuntimeError(f"a plain program has the ops {sorted(left)}: expected none of clinattn")
    return found


def plain_rotary(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    interleaved: bool,
    inverse: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The op clinattn::rotary by torch's ops; q is (B, H, N, D).

    A program may not write in place, as the op's definition does (rotary_op.reference_rotary).

    As encoders call it: all features turn, in halves. Raises NotImplementedError for others.
    """
    if interleaved or inverse or 2 * frequencies.shape[0] != q.shape[-1]:
        raise NotImplementedError("a plain program turns all features, in halves")
    angles = positions[..., None] * frequencies
    if positions.dim() == 2:
        angles = angles.unsqueeze(1)
    cos, sin = angles.cos(), angles.sin()

    def turned(x: Tensor) -> Tensor:
        a, b = x.to(cos.dtype).chunk(2, -1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)

    return turned(q), turned(k)


def ours_in(program: ExportedProgram) -> set[str]:
    """Names of the ops of clinattn in a program, those of its submodules too."""
    parts = [m for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return {
        node.target.name()
        for part in parts
        for node in part.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == OURS
    }


def write_program(program: ExportedProgram, path: str | Path) -> None:
    with written_whole(path) as partial:
        torch.export.save(program, partial)
