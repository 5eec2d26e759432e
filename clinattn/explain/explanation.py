"""Answers about the attention of a whole model: sums over queries, by layer and through layers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from clinattn.backends import call as records
from clinattn.backends.call import MAX_TOP, Summary
from clinattn.explain.record import Layer, Recorder
from clinattn.explain.tokens import MEAN, Tokens
from clinattn.operator.summary import SUMMARY
from clinattn.operator.words.scalars import as_float, as_int

Heads = str | Sequence[int] | None


def explain(model: nn.Module, layers: Collection[int] | None = None) -> Explanation:
    """Records what attention of a model reads, to answer what it looked at, in O(N) memory.

        with clinattn.explain(model) as e:
            out = model(**inputs)
        scores = e.rollout(token=0)

    model: in evaluation mode, with attention by clinattn: after replace_attention, or of
    clinattn.encoder. It is called as a module, in this thread; the last call counts. Calls of a
    graph of torch.compile are not recorded.
    layers: indices of the attention layers to keep, in the order of their calls; None for all.
    rollout and relevance take all.

    Keeps the queries, keys and normalisers of each layer, copied only where they are views of a
    tensor that holds values too; where gradients are on, all as autograd keeps it anyway.
    Returns an Explanation, whose methods say what they return. Raises TypeError or ValueError for
    wrong arguments; its methods raise RuntimeError where nothing was recorded, and ValueError for
    a layer that is not self-attention, by name.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: got {type(model).__name__}, expected a torch.nn.Module")
    chosen = None
    if layers is not None:
        if isinstance(layers, (str, int)):
            raise TypeError(f"layers: got {layers!r}, expected None or a list of ints")
        chosen = frozenset(as_int("layers", x) for x in layers)
        if not chosen or min(chosen) < 0:
            raise ValueError(f"layers: got {sorted(chosen)}, expected at least one, each >= 0")
    return Explanation(model, chosen)


class Explanation:
    """A record of attention within `with explain(model) as e:`, and answers about it.

    Results have one number for each token, laid out as the model was given them: (B, N) with 0 in
    padding, or (T,) for tokens packed by cu_seqlens; `split` makes a list of sequences of them.
    They are fp32, fp64 for fp64 models, and have no gradient. A padding token is no query, either.

    token: an int, or one for each sequence, counted among the real tokens, from the end if
    negative; or "mean", for the average of all real tokens, as a model that pools them reads.
    heads: "mean" of all heads, or a list of ints, the mean of those.
    """

    def __init__(self, model: nn.Module, chosen: frozenset[int] | None):
        self._recorder = Recorder(model, chosen)

    def __enter__(self) -> Explanation:
        self._recorder.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._recorder.__exit__()

    @property
    def layers(self) -> tuple[str, ...]:
        """Names of the modules whose attention was recorded, in the order of their calls."""
        return tuple(layer.name for layer in self._recorder.layers)

    def received(self, weights: Tensor | None = None, heads: Heads = MEAN) -> Tensor:
        """Returns the attention that each token gets: sum_i w_i p_ij, (layers, B, N).

        weights: of the queries, like the tokens; default 1, so that a sequence of n tokens gets n.
        heads: None for each head by itself, (layers, B, H, N), packed (layers, H, T).
        """
        layers, tokens = self._layers(), self._tokens
        weight = tokens.real if weights is None else tokens.as_attended("weights", weights)
        return self._stacked(
            [_columns(layer, weight, records.RECEIVED) for layer in layers], heads
        )

    def entropy(self, heads: Heads = MEAN) -> Tensor:
        """Returns the entropy of each token's weights in nats, (layers, B, N); heads as received.
        """
        rows = [_summary(x, None, None, records.ENTROPY)[0] for x in self._layers()]
        return self._stacked(rows, heads)

    def topk(self, token: Any, k: int = 8) -> tuple[Tensor, Tensor]:
        """Returns (values, places) of the k largest weights of one query of each sequence.

        k: 1 to 16. Both are (layers, sequences, H, k), descending. places are int64 and count as
        the caller does: in the row, padding included, or in the packed sequence; -1 where fewer
        than k weights are above 0. Ties: the first key first.
        """
        k = as_int("k", k)
        if not 1 <= k <= MAX_TOP:
            raise ValueError(f"k: got {k}, expected 1 to {MAX_TOP}")
        layers, tokens = self._layers(), self._tokens
        if isinstance(token, str):
            raise TypeError(f"token: got {token!r}, expected an int, or one for each sequence")
        at = tokens.chosen(token, torch.float32).flatten().nonzero().squeeze(1)
        if len(at) != tokens.sequences:
            raise ValueError("token: a sequence has no tokens, expected some in each for topk")
        values, places = [], []
        for layer in layers:
            found, keys = (
                _by_token(layer, x).flatten(0, layer.call.q.dim() - 3)[at]
                for x in _summary(layer, None, None, records.TOPK, k)
            )
            values.append(found)
            places.append(tokens.places(at, keys))
        return torch.stack(values), torch.stack(places)

    def rollout(self, token: Any, residual: float = 0.5, heads: Heads = MEAN) -> Tensor:
        """Returns the share of each input token in an output token by attention rollout, (B, N).

        From the last layer to the first, r_j <- residual r_j + (1 - residual) sum_i r_i p_ij, with
        p the mean over heads (Abnar & Zuidema, 2020, whose residual is 0.5).
        """
        if token is None:
            raise ValueError(
                "token: got None; rollout of all tokens at once is N x N by definition: expected "
                "one token"
            )
        residual = as_float("residual", residual)
        if not 0 <= residual <= 1:
            raise ValueError(f"residual: got {residual}, expected 0 to 1")
        layers = self._all_layers("rollout")
        r = self._tokens.chosen(token, layers[0].lse.dtype)
        for layer in reversed(layers):
            r = residual * r + (1 - residual) * _mean(layer, r, records.RECEIVED, heads)
        return self._tokens.as_given(r)

    def relevance(self, target: Tensor, token: Any = 0, heads: Heads = MEAN) -> Tensor:
        """Returns the relevance of each token to a number that the model computed, (B, N).

        From the last layer to the first, r_j <- r_j + mean_h sum_i r_i max(p_ij dp_ij, 0), where dp
        is the gradient of the target to p (Chefer et al., 2021).
        target: floating, from the output of the recorded call; of several numbers, such as one
        logit for each sequence, the sum is meant. token: the output token that it is read from.
        """
        layers = self._all_layers("relevance")
        r = self._tokens.chosen(token, layers[0].lse.dtype)

        def through(layer: Layer, do: Tensor) -> None:
            nonlocal r
            r = r + _mean(layer, r, records.RELEVANCE, heads, do)

        self._differentiate(target, layers, through)
        return self._tokens.as_given(r)

    def paid(self, token: Any, heads: Heads = MEAN) -> Tensor:
        """Returns the attention that an output token pays to each token in the last layer, (B, N).
        """
        layer = self._all_layers("paid")[-1]
        r = self._tokens.chosen(token, layer.lse.dtype)
        return self._tokens.as_given(_mean(layer, r, records.RECEIVED, heads))

    def token_read(self, target: Tensor) -> Any:
        """Returns the output token, one for each sequence, that a number is computed from, or
        "mean" where it depends on all of them.

        Such is the pooling of a classifier: after the last attention, tokens do not mix. target: as
        in relevance. Raises ValueError where it depends on some of the tokens.
        """
        layers, tokens = self._all_layers("token_read"), self._tokens
        read = torch.zeros_like(tokens.real)

        def look(_: Layer, do: Tensor) -> None:
            nonlocal read
            read = do.ne(0).any(-1).any(1) & tokens.real

        self._differentiate(target, layers[-1:], look)
        counts = tokens.summed(read.long())
        if bool((counts <= 1).all()):
            return tokens.summed(torch.where(read, tokens.ranks()[0], 0))
        if torch.equal(read, tokens.real):
            return MEAN
        raise ValueError(
            f"token: got None, and the target depends on {counts.tolist()} tokens of the "
            "sequences: expected the token that it is read from, or 'mean'"
        )

    def split(self, x: Tensor) -> list[Tensor]:
        """Returns a result, laid out as the tokens, as one tensor for each sequence, no padding."""
        self._layers()
        return self._tokens.split(x)

    @property
    def cu_seqlens(self) -> Tensor | None:
        """The ends of sequences where the model was given packed tokens of clinattn.encoder."""
        return getattr(self._recorder.layout, "cu_seqlens", None)

    def laid_out(self, x: Tensor) -> Tensor:
        """Returns numbers of tokens as the model's embeddings had them as the model was given them.
        """
        layout = self._recorder.layout
        return x if layout is None else layout.restore(x)

    def _differentiate(
        self, target: Tensor, layers: Sequence[Layer], take: Callable[[Layer, Tensor], None]
    ) -> None:
        """Calls take(layer, do) from the last layer to the first, in the course of the backward
        pass: do, the gradient to the output of attention, is of one layer at a time.
        """
        if not isinstance(target, Tensor) or not target.is_floating_point():
            got = target.dtype if isinstance(target, Tensor) else type(target).__name__
            raise TypeError(f"target: got {got}, expected a floating tensor from the output")
        outputs = [layer.o for layer in layers if layer.o is not None]
        if not target.requires_grad or len(outputs) < len(layers):
            raise ValueError(
                "target: has no gradient to attention, expected the model to be called with "
                "gradients on, and a parameter or input that requires one"
            )
        taken = 0

        def hook_of(layer: Layer) -> Callable[[Tensor], None]:
            def hook(do: Tensor) -> None:
                nonlocal taken
                taken += 1
                take(layer, do.detach())

            return hook

        pairs = zip(layers, outputs, strict=True)
        handles = [o.register_hook(hook_of(layer)) for layer, o in pairs]
        try:
            torch.autograd.grad(target.sum(), outputs[0], retain_graph=True, allow_unused=True)
        finally:
            for handle in handles:
                handle.remove()
        if taken < len(layers):
            raise ValueError(
                f"target: depends on {taken} of the {len(layers)} layers that were recorded, "
                "expected a number from the output of the last call"
            )

    @property
    def _tokens(self) -> Tokens:
        recorder = self._recorder
        calls = [layer.call for layer in recorder.layers]
        return Tokens.of(calls, recorder.layout, recorder.attention_mask, recorder.given)

    def _layers(self) -> list[Layer]:
        recorder = self._recorder
        if recorder.chosen is not None and recorder.calls:
            missing = sorted(x for x in recorder.chosen if x >= recorder.calls)
            if missing:
                raise ValueError(
                    f"layers: got {missing}, and the model called attention {recorder.calls} times"
                )
        if not recorder.layers:
            raise RuntimeError(
                f"explain: no attention of {type(recorder.model).__name__} was recorded, expected "
                "a call of the model within `with clinattn.explain(model)`, eager, with attention "
                "by clinattn: clinattn.replace_attention(model) gives a model that"
            )
        first = recorder.layers[0]
        for layer in recorder.layers:
            if layer.other is not None:
                raise ValueError(
                    f"{layer.name} (layer {layer.index}): {layer.other}, expected self-attention; "
                    "explain(model, layers=[...]) leaves layers out"
                )
            if _shape(layer) != _shape(first):
                raise ValueError(
                    f"{layer.name} (layer {layer.index}): has tokens {_shape(layer)}, expected "
                    f"those of {first.name}, {_shape(first)}"
                )
        return recorder.layers

    def _all_layers(self, what: str) -> list[Layer]:
        recorder = self._recorder
        layers = self._layers()
        if len(layers) < recorder.calls:
            raise ValueError(
                f"layers: {len(layers)} of {recorder.calls} were kept, expected all for {what}, "
                "which goes through them"
            )
        return layers

    def _stacked(self, by_layer: list[Tensor], heads: Heads) -> Tensor:
        results = []
        for layer, x in zip(self._layers(), by_layer, strict=True):
            x = _by_token(layer, x)
            if heads is not None:
                x = x[..., _chosen_heads(layer, heads)].mean(-1)
            x = self._tokens.as_given(x)
            results.append(x if heads is not None else x.movedim(-1, -2))
        return torch.stack(results)


def _shape(layer: Layer) -> tuple[int, ...]:
    """The shape of a layer's tokens, (B, N) or (T,)."""
    q = layer.call.q
    return (q.shape[0],) if layer.call.is_packed() else (q.shape[0], q.shape[2])


def _by_token(layer: Layer, x: Tensor) -> Tensor:
    """(B, H, N, ...) -> (B, N, H, ...), packed (H, T, ...) -> (T, H, ...)."""
    return x.transpose(0, 1) if layer.call.is_packed() else x.transpose(1, 2)


def _chosen_heads(layer: Layer, heads: Heads) -> list[int] | slice:
    if heads is None or isinstance(heads, str):
        if heads != MEAN:
            raise ValueError(f"heads: got {heads!r}, expected 'mean' or a list of ints")
        return slice(None)
    chosen = [as_int("heads", x) for x in heads]
    count = layer.call.q.shape[1]
    if not chosen or len(set(chosen)) < len(chosen) or not 0 <= min(chosen) <= max(chosen) < count:
        raise ValueError(f"heads: got {chosen}, expected some of 0 to {count - 1}, each once")
    return chosen


def _mean(layer: Layer, r: Tensor, reduce: int, heads: Heads, do: Tensor | None = None) -> Tensor:
    """The mean over heads of sum_i r_i f(p_ij), (B, N) or (T,)."""
    chosen = _chosen_heads(layer, heads)
    columns = _columns(layer, r, reduce, chosen, do)
    return _by_token(layer, columns)[..., chosen].mean(-1)


def _columns(
    layer: Layer,
    weight: Tensor,
    reduce: int,
    heads: list[int] | slice = slice(None),
    do: Tensor | None = None,
) -> Tensor:
    """Sums over queries, laid out as lse; of other than the given heads they are 0.

    weight: of the queries, (B, N) or (T,), for all heads.
    """
    lse = layer.lse
    weights = torch.zeros_like(lse)
    _by_token(layer, weights)[..., heads] = weight.to(lse.dtype)[..., None]
    return _summary(layer, weights, do, reduce)[0]


def _summary(
    layer: Layer, weights: Tensor | None, do: Tensor | None, reduce: int, top: int = 1
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        return SUMMARY(*Summary(layer.lse, None, weights, do), *layer.call, reduce, top, "")
