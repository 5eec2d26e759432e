"""Scores of tokens for an answer of a model, one for each token, by a choice of methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from clinattn.explain import gradients, groups
from clinattn.explain.explanation import Explanation, Heads
from clinattn.explain.tokens import MEAN
from clinattn.operator.words.scalars import as_int

# Methods, and whether they read attention
METHODS = {
    "attnlrp": False,
    "gradient_x_input": False,
    "integrated_gradients": False,
    "attingrad": True,
    "relevance": True,
    "rollout": True,
}
IDS = ("input_ids", "inputs")  # what a baseline of ids takes the place of


def attribute(
    model: nn.Module,
    inputs: Mapping[str, Any],
    target: int | Tensor | Callable[[Any], Tensor],
    method: str = "attnlrp",
    *,
    token: Any = None,
    by: Any = None,
    steps: int = 32,
    baseline: Any = None,
    embeddings: nn.Module | None = None,
    heads: Heads = MEAN,
) -> Tensor:
    """Scores what each token did for one answer of a model.

    model: in evaluation mode. "attingrad", "relevance" and "rollout" read its attention, which is
    by clinattn then: after replace_attention, or of clinattn.encoder.
    inputs: the keyword arguments that it is called with.
    target: an index of its logits (sequences, classes), one for all or an integer tensor
    (sequences,); or a function of its output that returns a floating number for each sequence.
    method, x being the output of `embeddings`, and its gradient that of the target:

    - "attnlrp": x times the gradient by the rules of AttnLRP (Achtibat et al., 2024; rules.py);
    - "gradient_x_input": x times its gradient (Shrikumar et al., 2017);
    - "integrated_gradients": (x - b) times the mean gradient between b and x (Sundararajan et al.,
      2017), by Gauss-Legendre quadrature of `steps` forward and backward passes;
    - "attingrad": the attention that the token of the answer pays in the last layer, times the
      length of x times its gradient (Edin et al., 2024);
    - "relevance", "rollout": as the methods of `explain`.

    The first three are summed over features, and signed.
    token: of the last three, the output token that the target is read from, as in `explain`; left
    out, it is the one that the target depends on after the last attention, or "mean" for all.
    by: what each token belongs to, integers of the shape of the tokens (words_of, visits) or lists
    of ints and None; scores are summed by it.
    baseline: of integrated gradients: None for zeros; a token id, or ids like input_ids, which are
    embedded; or inputs to change, a mapping. embeddings: the module whose output is attributed to;
    default the token embedding of a model of transformers, and all embeddings of an encoder of
    clinattn, positions too. heads: of relevance, rollout and attingrad, as in `explain`.

    Returns scores laid out as the tokens, (B, N), or (T,) where they are packed by cu_seqlens, in
    fp32 at least; with `by` (sequences, groups). Raises TypeError or ValueError for wrong
    arguments, NotImplementedError for a part of the model that AttnLRP has no rule for, by name,
    and RuntimeError where attention is not by clinattn.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    if not isinstance(inputs, Mapping):
        raise TypeError(f"inputs: got {type(inputs).__name__}, expected keyword arguments, a dict")
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}")
    if model.training:
        raise ValueError("model: got one in training mode, expected evaluation mode: model.eval()")
    steps = as_int("steps", steps)
    if steps < 1:
        raise ValueError(f"steps: got {steps}, expected at least 1")
    reads = METHODS[method]
    for name, given, wanted in (
        ("token", token is not None, reads),
        ("heads", not (isinstance(heads, str) and heads == MEAN), reads),
        ("baseline", baseline is not None, method == "integrated_gradients"),
    ):
        if given and not wanted:
            raise ValueError(f"{name}: got one, expected none with method={method!r}")
    module = gradients.embedding_of(model) if embeddings is None else embeddings
    embedded = gradients.Embedded(model, inputs, module)
    # without attention to read, what it records is the layout of the batch
    e = Explanation(model, None if reads else frozenset())
    with torch.inference_mode(False), torch.enable_grad():
        with e:
            out, x = embedded.leaf()
        score = _score(out, target)
        if method == "attnlrp":
            from clinattn.explain import rules  # imports the encoder

            rules.apply(score, x)
        if reads:
            token = e.token_read(score) if token is None else token
            scores = _by_attention(e, method, score, x, token, heads)
        else:
            if method == "integrated_gradients":
                start = _baseline(embedded, x, baseline)
                parts = gradients.integrated(
                    embedded, lambda out: _score(out, target), x.detach(), start, steps
                )
                scores = parts.to(torch.promote_types(x.dtype, torch.float32)).sum(-1)
            else:
                scores = gradients.scores_of(x, gradients.gradient(score, x))
            scores = e.laid_out(scores)
    scores = scores.detach()
    return scores if by is None else groups.summed(scores, by, e.cu_seqlens)


def _by_attention(
    e: Explanation, method: str, score: Tensor, x: Tensor, token: Any, heads: Heads
) -> Tensor:
    if method == "rollout":
        return e.rollout(token, heads=heads)
    if method == "relevance":
        return e.relevance(score, token, heads)
    lengths = gradients.norms_of(x, gradients.gradient(score, x))
    return e.paid(token, heads) * e.laid_out(lengths)


def _score(out: Any, target: Any) -> Tensor:
    """The number of each sequence that is explained."""
    if callable(target):
        score = target(out)
        if not isinstance(score, Tensor) or not score.is_floating_point() or score.dim() > 1:
            got = tuple(score.shape) if isinstance(score, Tensor) else type(score).__name__
            raise ValueError(
                f"target: its function returned {got}, expected a floating tensor, one number for "
                "each sequence"
            )
        return score
    logits = getattr(out, "logits", out)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"target: got an index, and the model returned {got}, expected logits of two "
            "dimensions; a function of the output chooses among others"
        )
    sequences, classes = logits.shape
    if isinstance(target, Tensor) and target.dim() == 1:
        if target.is_floating_point() or target.shape != (sequences,):
            raise ValueError(
                f"target: got {target.dtype} {tuple(target.shape)}, expected integers "
                f"({sequences},)"
            )
        at = target.to(logits.device).long()
    else:
        index = as_int("target", target, "an int, integers or a function")
        at = torch.full((sequences,), index, device=logits.device)
    if bool(((at < 0) | (at >= classes)).any()):
        raise ValueError(f"target: got {at.tolist()}, expected 0 to {classes - 1}")
    return logits.gather(1, at[:, None])[:, 0]


def _baseline(embedded: gradients.Embedded, x: Tensor, baseline: Any) -> Tensor:
    """Returns embeddings that stand for the absence of tokens, shaped like x."""
    if baseline is None:
        return torch.zeros_like(x)
    if not isinstance(baseline, Mapping):
        name = next((name for name in IDS if name in embedded.inputs), None)
        if name is None:
            raise ValueError(f"baseline: got ids, and inputs have none of {', '.join(IDS)}")
        ids = embedded.inputs[name]
        if isinstance(baseline, Tensor) and baseline.dim() > 0:
            if baseline.shape != ids.shape:
                raise ValueError(
                    f"baseline: got shape {tuple(baseline.shape)}, expected {tuple(ids.shape)}"
                )
        else:
            expected = "None, a token id, ids, or a dict of inputs"
            baseline = torch.full_like(ids, as_int("baseline", baseline, expected))
        baseline = {name: baseline}
    unknown = [name for name in baseline if name not in embedded.inputs]
    if unknown:
        raise ValueError(f"baseline: got {unknown}, expected some of {list(embedded.inputs)}")
    start = embedded.value({**embedded.inputs, **baseline})
    if start.shape != x.shape:
        raise ValueError(
            f"baseline: its embeddings are {tuple(start.shape)}, expected those of the inputs, "
            f"{tuple(x.shape)}"
        )
    return start
