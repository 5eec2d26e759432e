"""The public functions' calls, as they are computed where sequences are split over processes."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from clinattn.backends.call import Arguments
from clinattn.operator import listeners
from clinattn.operator.assemble import dense_call, packed_call
from clinattn.operator.split import Part
from clinattn.operator.words import checks, feature_checks
from clinattn.operator.words.scalars import as_flag
from clinattn.parallel.attention import SplitAttention
from clinattn.parallel.documents import EVERYTHING, Documents, Sides, seen
from clinattn.parallel.plan import Plan, Range, plan, shards
from clinattn.parallel.prefix import Prefix, prefix_keys, prefix_queries, unprefixed
from clinattn.parallel.processes import Processes
from clinattn.parallel.request import Request
from clinattn.parallel.times import time_sides

INSTEAD = {
    "attn_mask": "kv_lengths and q_lengths tell padding",
    "segment_ids": "cu_seqlens of fused_attention_varlen tells documents",
    "dropout_p": "0 is",
}


class SplitCalls:
    """The calls of one block; it is operator.split's Split."""

    def __init__(self, processes: Processes, gathered: bool):
        self._processes, self._gathered = processes, gathered
        for name in ("dense", "packed", "part", "check", "gathered", "summed"):
            # a compiled graph ends before them: what is sent is no part of it
            setattr(self, name, torch.compiler.disable(getattr(self, name)))
        self._shards: list[Range] | None = None
        self._checked: dict[int, Tensor] = {}
        self._agreed: set[tuple[Any, ...]] = set()
        self._plans: dict[tuple[Any, ...], tuple[Plan, Prefix | None]] = {}

    @property
    def processes(self) -> int:
        return self._processes.size

    def dense(
        self, query: Tensor, key: Tensor, value: Tensor, *,
        is_causal: bool, scale: float | None, enable_gqa: bool, window: Any, bottom_right: bool,
        kv_lengths: Tensor | None, q_lengths: Tensor | None, times: Tensor | None,
        time_window: float | None, softcap: float | None, global_prefix: int, return_lse: bool,
        backend: str | None, **others: Any,
    ) -> Any:  # fmt: skip
        """fused_attention of this process's tokens; all words are given."""
        refuse(query, key, value, others)
        call, form = dense_call(
            query, key, value, None, 0.0, is_causal, scale, enable_gqa, window, bottom_right,
            softcap=softcap,
        )  # fmt: skip
        refuse_other_keys(query.shape[-2], key.shape[-2])
        if form is not None:
            form.refuse(kv_lengths=kv_lengths, q_lengths=q_lengths, times=times)
        rows, device = len(call.q), call.q.device
        total = self.part(call.q.shape[2]).total
        queries, keys = (
            None if x is None else checks.check_lengths(name, x, rows, total, device)
            for name, x in (("q_lengths", q_lengths), ("kv_lengths", kv_lengths))
        )
        if times is not None and not (queries is keys is None):
            raise NotImplementedError(
                "times: not served with kv_lengths or q_lengths where a sequence is split; "
                "fused_attention_varlen takes them with cu_seqlens"
            )
        q, k, v = (x.transpose(1, 2) for x in call[:3])
        sides = self._sides(call, times, time_window, None, (rows, call.q.shape[2]))
        documents = Documents.dense(rows, total, queries, keys)
        call = call._replace(q=q, k=k, v=v)
        prefix = feature_checks.check_global_prefix(global_prefix, total)
        results = self._attend(call, documents, sides, prefix, backend)
        o, lse = results[0].transpose(1, 2), results[1].transpose(0, 1)
        if form is not None:
            o, lse = form.as_given(o, 2), form.as_given(lse, 2)
        return (o, lse) if as_flag("return_lse", return_lse) else o

    def packed(
        self, query: Tensor, key: Tensor, value: Tensor, *,
        cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, max_seqlen_q: int | None,
        max_seqlen_k: int | None, is_causal: bool, scale: float | None, enable_gqa: bool,
        window: Any, bottom_right: bool, times: Tensor | None, time_window: float | None,
        softcap: float | None, global_prefix: int, return_lse: bool, backend: str | None,
        **others: Any,
    ) -> Any:  # fmt: skip
        """fused_attention_varlen of this process's tokens; all words are given."""
        refuse(query, key, value, others)
        refuse_other_keys(query.shape[0], key.shape[0])
        whole = torch.tensor((0, query.shape[0]), dtype=torch.int32, device=query.device)
        call = packed_call(
            query, key, value, whole, None, query.shape[0], query.shape[0], 0.0, is_causal, scale,
            enable_gqa, window, bottom_right, softcap=softcap,
        )  # fmt: skip
        total = self.part(query.shape[0]).total
        for side, ends, longest in (
            ("q", cu_seqlens_q, max_seqlen_q), ("k", cu_seqlens_k, max_seqlen_k)
        ):  # fmt: skip
            if ends is not None:
                checks.check_cu_seqlens(side, ends, longest, total, query.device)
                if int(ends[-1]) != total:
                    raise ValueError(
                        f"cu_seqlens_{side}: got a last value of {int(ends[-1])}, expected that of "
                        f"whole sequences, the {total} tokens of all processes together"
                    )
        if cu_seqlens_k is not None and not torch.equal(cu_seqlens_q, cu_seqlens_k):
            raise NotImplementedError(
                "cu_seqlens_k: got others than cu_seqlens_q, expected the same where a sequence is "
                "split over processes"
            )
        q, k, v = (x[None] for x in call[:3])
        sides = self._sides(call, times, time_window, cu_seqlens_q, (len(query),))
        documents = Documents.packed(cu_seqlens_q)
        call = call._replace(q=q, k=k, v=v)
        prefix = feature_checks.check_global_prefix(global_prefix, None)
        o, lse = self._attend(call, documents, sides, prefix, backend)
        return (o[0], lse[:, 0]) if as_flag("return_lse", return_lse) else o[0]

    def _sides(
        self,
        call: Arguments,
        times: Tensor | None,
        time_window: Any,
        cu_seqlens: Tensor | None,
        shape: tuple[int, ...],
    ) -> Sides:
        """Returns what bounds the keys of whole sequences. shape: that of times."""
        time_window = feature_checks.check_time_words(times, time_window, None)
        sides = Sides(call.window_left, call.window_right)
        if times is None:
            return sides
        feature_checks.check_times(times, call.q, shape)
        dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
        whole = self.gathered(times, -1)
        return sides._replace(of_time=time_sides(whole, time_window, cu_seqlens, dtype))

    def _attend(
        self,
        call: Arguments,
        documents: Documents,
        sides: Sides,
        prefix: int,
        backend: str | None,
    ) -> tuple[Tensor, Tensor]:
        """call: q, k and v (B, n, H, D), its scalars for itself alone."""
        backend = checks.check_backend(backend)
        said = self._said(call, documents, sides, prefix)
        self._agree(call.q.shape[1], said)
        key = (said, call.q.device)
        if key not in self._plans:
            self._plans[key] = self._plan(documents, sides, prefix, call.q.device)
        request = Request(
            self._processes, *self._plans[key], call.scale, call.softcap, backend,
            sides.is_bounded(),
        )  # fmt: skip
        return SplitAttention.apply(*call[:3], request)

    def _said(
        self, call: Arguments, documents: Documents, sides: Sides, prefix: int
    ) -> tuple[Any, ...]:
        """Returns what all processes must say alike of a call."""
        shapes = [(len(x), *x.shape[2:]) for x in call[:3]]
        ends, times = (
            [zlib.crc32(x.numpy().tobytes()) for x in numbers]
            for numbers in (documents[2:], sides.of_time)
        )
        words = {"rows, heads and head_dim": shapes, "dtype": call.q.dtype, "scale": call.scale}
        words |= {"softcap": call.softcap, "window": sides[:2], "global_prefix": prefix}
        words |= {"documents": ends, "times": times}
        return tuple((name, str(x)) for name, x in words.items())

    def _plan(
        self, documents: Documents, sides: Sides, prefix: int, device: torch.device
    ) -> tuple[Plan, Prefix | None]:
        assert self._shards is not None
        everyone, rank = self._shards, self._processes.rank
        at_once = self._gathered or sides.is_bounded()
        place = torch.arange(*everyone[rank])
        visible = seen(documents, sides, place)
        of_prefix = None
        if prefix and sides != EVERYTHING:
            of_prefix = Prefix(
                prefix_keys(documents, visible, place, everyone, rank, prefix, device),
                prefix_queries(documents, everyone, rank, prefix, device),
            )
            visible = unprefixed(documents, visible, place, prefix)
        return plan(documents, sides, visible, everyone, rank, at_once, device), of_prefix

    def part(self, tokens: int) -> Part:
        self._agree(tokens)
        assert self._shards is not None
        shard = self._shards[self._processes.rank]
        return Part(*shard, self._shards[-1].end)

    def _agree(self, tokens: int, said: tuple[Any, ...] = ()) -> None:
        """Learns how many tokens each process has; of what is said the first time, that all do."""
        if self._shards is not None:
            mine = self._shards[self._processes.rank].length
            if tokens != mine:
                raise ValueError(
                    f"got {tokens} tokens after {mine} in one context_parallel block, expected the "
                    "same number; enter another block for another batch"
                )
            if said in self._agreed:
                return
        everyone = self._processes.said((tokens, said))
        for rank, (_, theirs) in enumerate(everyone):
            for (name, mine), (other_name, other) in zip(said, theirs, strict=False):
                if (name, mine) != (other_name, other):
                    raise ValueError(
                        f"processes of the mesh call attention differently: {name} is {mine} in "
                        f"{self._processes.rank}, {other_name} is {other} in {rank}"
                    )
            if len(said) != len(theirs):
                raise ValueError("processes of the mesh do not run the same program")
        self._shards = shards([n for n, _ in everyone])
        self._agreed.add(said)

    def check(self, x: Tensor, wrong: Callable[[], str | None]) -> None:
        if id(x) in self._checked:
            return
        said = [words for words in self._processes.said(wrong()) if words]
        if said:
            raise ValueError(said[0])
        self._checked[id(x)] = x  # kept, so that no other tensor gets its id

    def gathered(self, x: Tensor, dim: int) -> Tensor:
        self.part(x.shape[dim])
        assert self._shards is not None
        return self._processes.gathered(x, dim, [shard.length for shard in self._shards])

    def summed(self, x: Tensor) -> Tensor:
        return Summed.apply(x, self._processes)


class Summed(torch.autograd.Function):
    """The sum over processes, whose gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: Processes) -> Tensor:
        ctx.processes = processes
        return processes.summed(x.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return Summed.apply(grad, ctx.processes), None


def refuse(query: Tensor, key: Tensor, value: Tensor, others: dict[str, Any]) -> None:
    """Raises NotImplementedError for words and modes that are not served."""
    for name, x in others.items():
        if x is not None and not (name == "dropout_p" and x == 0):
            instead = INSTEAD.get(name)
            raise NotImplementedError(
                f"{name}: not served where a sequence is split over processes"
                + (f"; {instead}" if instead else "")
            )
    if torch.compiler.is_compiling():
        raise NotImplementedError("torch.export: not served inside context_parallel")
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            checks.check_tensor(name, x)
        if type(x) not in (Tensor, torch.nn.Parameter):
            raise NotImplementedError(
                f"{type(x).__name__}: not served inside context_parallel, expected plain tensors"
            )
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise NotImplementedError("torch.func: not served inside context_parallel")
    if listeners.on:
        raise NotImplementedError("explain: not served inside context_parallel")


def refuse_other_keys(queries: int, keys: int) -> None:
    if queries != keys:
        raise NotImplementedError(
            f"cross-attention: got {queries} queries and {keys} keys, expected as many where a "
            "sequence is split over processes"
        )
