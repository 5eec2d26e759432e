"""A trial of a model: does it keep the sequences of a packed row apart?"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from clinattn.integrations.trainer.heads import Pool, PooledApart, first_tokens, means
from clinattn.integrations.trainer.split import ENDS, per_sequence

LENGTHS = (5, 4)  # of the two sequences that a model is tried with
ONE_LABEL = ("ForSequenceClassification", "ForNextSentencePrediction", "ForPreTraining")
# By the end of a class's name, why a packed row cannot serve it
REFUSED = {
    "ForQuestionAnswering": "start and end are found among the tokens of a row, which would be "
    "those of all its sequences",
    "ForMultipleChoice": "the choices of a question are rows of a batch",
    "ForCausalLM": "its labels are shifted over the ends of sequences; transformers' "
    "DataCollatorWithFlattening serves decoders",
    "ForConditionalGeneration": "it has two sequences, of an encoder and of a decoder",
}
HEAD = "_head_of_packed_rows"  # where a model keeps its hooks, so that they are set once
WAY_OUT = (
    "give it padded batches (transformers' own Trainer and collators), which replaced models take"
)


class Serving(NamedTuple):
    """The way in which a model takes packed rows.

    names: the words of its forward. position_start: the position of a first token, None where the
    model takes no positions. most_positions: the longest sequence it has positions for, or None.
    labels: "tokens" or "sequences".
    """

    names: frozenset[str]
    position_start: int | None
    most_positions: int | None
    labels: str


def serve(model: nn.Module) -> Serving:
    """Finds out how a model takes packed rows, and hooks a head that reads one vector of a row.

    Two short sequences are computed alone and packed, in eval mode without gradients. Of the ways
    to number positions and to pool, that is taken whose results agree best; they have to agree in
    half of the digits, and another second sequence has to leave all bits of the first.

    Raises TypeError for what is no model of transformers, NotImplementedError for models that do
    not keep sequences apart, with a way out.
    """
    inner: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    inner = getattr(inner, "_orig_mod", inner)
    name = type(inner).__name__
    if not hasattr(inner, "config") or not hasattr(inner, "base_model"):
        raise TypeError(f"model: got {name}, expected a model of transformers")
    for end, reason in REFUSED.items():
        if name.endswith(end):
            raise NotImplementedError(f"{name} does not take packed rows: {reason}; {WAY_OUT}")
    if any(p.is_meta for p in inner.parameters()):
        raise ValueError(f"model: {name} has weights on the meta device, expected loaded ones")
    parameters = inspect.signature(inner.forward).parameters
    names = frozenset(parameters)
    if any(x.kind is x.VAR_KEYWORD for x in parameters.values()):
        names |= {ENDS, "cu_seq_lens_k", "max_length_q", "max_length_k"}
    one_label = name.endswith(ONE_LABEL)
    starts = [0, _padding(inner) + 1] if "position_ids" in names else [None]
    pooled = one_label or getattr(inner.base_model, "pooler", None) is not None
    pools: tuple[Pool | None, ...] = (first_tokens, means) if pooled else (None,)
    earlier = vars(inner).pop(HEAD, None)
    if earlier is not None:
        earlier.remove()
    labels = "sequences" if name.endswith(ONE_LABEL[:2]) else "tokens"
    with _quiet(inner):
        ids = _ids(inner)
        alone = [{n: y[0] for n, y in _run(inner, input_ids=x[None]).items()} for x in ids]
        tried: list[tuple[float, Pool | None, Serving]] = []
        for pool in pools:
            with _pooled(inner, pool):
                for start in starts:
                    serving = Serving(names, start, _most_positions(inner, start), labels)
                    packed = _packed(inner, serving, ids)
                    if packed is not None and _apart(inner, serving, ids):
                        tried.append((_difference(packed, alone), pool, serving))
    if tried and min(x[0] for x in tried) <= 1:
        _, best, serving = min(tried, key=lambda x: x[0])
        if best is not None:
            vars(inner)[HEAD] = PooledApart(inner.base_model, best)
        return serving
    chosen = getattr(inner.config, "_attn_implementation", None)
    how = "" if chosen == "clinattn" else ", or call clinattn.replace_attention(model) first"
    raise NotImplementedError(
        f"{name} (attn_implementation={chosen!r}) does not take packed rows: two sequences of one "
        f"row did not give what they give alone; {WAY_OUT}{how}"
    )


def boundaries(lengths: list[int], device: Any = None) -> dict[str, Any]:
    """The words that tell attention where the sequences of a row begin and end."""
    ends = torch.tensor([0, *lengths], device=device).cumsum(0, dtype=torch.int32)
    longest = max(lengths)
    return {
        ENDS: ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest
    }  # fmt: skip


def positions(lengths: list[int], start: int, device: Any = None) -> Tensor:
    """(1, T) positions that start over with each sequence."""
    return torch.cat([torch.arange(start, start + n, device=device) for n in lengths])[None]


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, without gradients; each module gets its mode back."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _pooled(model: Any, pool: Pool | None) -> Iterator[None]:
    head = None if pool is None else PooledApart(model.base_model, pool)
    try:
        yield
    finally:
        if head is not None:
            head.remove()


def _padding(model: Any) -> int:
    padding = getattr(model.config, "pad_token_id", None)
    return 0 if padding is None else padding


def _ids(model: Any) -> list[Tensor]:
    """Two sequences of tokens, none of them padding."""
    vocabulary = model.get_input_embeddings().num_embeddings
    device = model.get_input_embeddings().weight.device
    ids = [i for i in range(vocabulary) if i != _padding(model)][-sum(LENGTHS) :]
    if not ids:
        raise ValueError(f"model: got a vocabulary of {vocabulary}, expected two tokens at least")
    ids = (ids * sum(LENGTHS))[: sum(LENGTHS)]
    return list(torch.tensor(ids, device=device).split(list(LENGTHS)))


def _run(model: Any, **words: Any) -> dict[str, Tensor]:
    """Outputs by name, and what the encoder gave: a new head may give the same for everything."""
    found = {}

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        found["of the encoder"] = output[0]

    handle = model.base_model.register_forward_hook(keep, prepend=True)
    try:
        outputs = model(**words)
    finally:
        handle.remove()
    return found | {name: x for name, x in outputs.items() if isinstance(x, Tensor) and x.dim()}


def _packed(model: Any, serving: Serving, ids: list[Tensor]) -> list[dict[str, Tensor]] | None:
    """Results of each sequence of a row; None where they have other shapes."""
    lengths = [len(x) for x in ids]
    batch = boundaries(lengths, ids[0].device)
    if serving.position_start is not None:
        batch["position_ids"] = positions(lengths, serving.position_start, ids[0].device)
    words = {name: x for name, x in batch.items() if name in serving.names}
    try:
        return per_sequence(_run(model, input_ids=torch.cat(ids)[None], **words), batch)
    except (ValueError, IndexError, RuntimeError):
        return None


def _difference(packed: list[dict[str, Tensor]], alone: list[dict[str, Tensor]]) -> float:
    """The largest, in units of half of the digits of the largest number; inf for other shapes."""
    largest = 0.0
    for one, other in zip(packed, alone, strict=True):
        for name, truth in other.items():
            if name not in one or one[name].shape != truth.shape:
                return inf
            if truth.is_floating_point():
                digits = torch.finfo(truth.dtype)
                unit = digits.eps**0.5 * max(float(truth.abs().max()), digits.tiny)
                largest = max(largest, float((one[name] - truth).abs().max()) / unit)
    return largest


def _apart(model: Any, serving: Serving, ids: list[Tensor]) -> bool:
    """Returns whether the first sequence keeps its bits when the second is another one."""
    runs = [_packed(model, serving, [ids[0], x]) for x in (ids[1], ids[1].flip(0))]
    return all(torch.equal(x, runs[1][0][name]) for name, x in runs[0][0].items())  # type: ignore


def _most_positions(model: nn.Module, start: int | None) -> int | None:
    tables = [
        module.num_embeddings - (start or 0)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings")
        and "relative" not in name
    ]  # fmt: skip
    return min(tables, default=None)
