"""Sequences of a batch, one after the other in one row, for models of transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clinattn.integrations.trainer.serving import boundaries, positions, serve

OURS = ("position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
LABELS = {"label": "labels", "label_ids": "labels"}


class PackingCollator:
    """Puts the sequences of a batch into one row without padding.

    model: a model of transformers after clinattn.replace_attention. It is run once with two short
    sequences, to find out that it keeps packed ones apart; a head for one label a sequence
    (ForSequenceClassification) is given each sequence's own vector from then on.
    collator: what makes a padded batch of features, such as DataCollatorForLanguageModeling; its
    padding is taken out again. None takes features as they are. max_length: longer sequences are
    cut there, with their labels; None cuts nothing. labels: "tokens" (one for each token, -100 for
    none), "sequences", or None to go by the class of the model.

    A call takes a list of S features: dicts of input_ids (N,), and of what the model's forward
    takes besides, numbers or (N,) for each token; other columns are left out. Tokens that
    attention_mask (N,) hides are left out too. Returns a dict for the model:
        input_ids, position_ids, token_type_ids ...: (1, T), int64, T tokens of all sequences;
        position_ids start over with each sequence, where the model counts from.
        labels: (1, T), or (S,) and (S, C) of sequences.
        cu_seq_lens_q, cu_seq_lens_k: (S + 1,), int32, where the sequences begin and end;
        max_length_q, max_length_k: the longest, int.
    There is no attention_mask.

    Raises TypeError and NotImplementedError as to the model, at once; ValueError for features that
    are empty, do not fit one another, or are longer than the model has positions for.
    """

    def __init__(
        self,
        model: nn.Module,
        collator: Callable[[list[Any]], Mapping[str, Any]] | None = None,
        *,
        max_length: int | None = None,
        labels: str | None = None,
    ):
        if labels not in (None, "tokens", "sequences"):
            raise ValueError(f"labels: got {labels!r}, expected 'tokens' or 'sequences'")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length: got {max_length}, expected a number of tokens")
        serving = serve(model)
        self.collator, self.max_length = collator, max_length
        self.labels = labels or serving.labels
        self.names = serving.names
        self.position_start, self.most_positions = serving.position_start, serving.most_positions

    def __call__(self, features: Sequence[Any]) -> dict[str, Any]:
        if not features:
            raise ValueError("features: got none, expected one sequence at least")
        rows = list(features) if self.collator is None else _rows(self.collator(list(features)))
        columns: dict[str, list[Tensor]] = {}
        for row in rows:
            for name, x in self._columns(row).items():
                columns.setdefault(name, []).append(x)
        lengths = [len(x) for x in columns["input_ids"]]
        batch: dict[str, Any] = {}
        for name, parts in columns.items():
            if len(parts) != len(rows):
                raise ValueError(f"{name}: {len(parts)} of {len(rows)} features have it")
            of_tokens = self._is_of_tokens(name, parts[0])
            batch[name] = torch.cat(parts)[None] if of_tokens else torch.stack(parts)
        words = boundaries(lengths)
        if self.position_start is not None:
            words["position_ids"] = positions(lengths, self.position_start)
        return batch | words

    def _is_of_tokens(self, name: str, x: Tensor) -> bool:
        return x.dim() > 0 and (name != "labels" or self.labels == "tokens")

    def _columns(self, row: Mapping[str, Any]) -> dict[str, Tensor]:
        """The columns of a feature that the model takes, without hidden tokens."""
        given = {LABELS.get(name, name): x for name, x in row.items() if x is not None}
        if "input_ids" not in given:
            raise ValueError(f"features: got {', '.join(row)}, expected input_ids among them")
        for name in OURS:
            if name in given:
                raise ValueError(f"{name}: got one in the features, and the collator makes it")
        ids = torch.as_tensor(given["input_ids"])
        if ids.dim() != 1 or not len(ids):
            raise ValueError(f"input_ids: got shape {tuple(ids.shape)}, expected (N,), N > 0")
        mask = given.pop("attention_mask", None)
        kept = None if mask is None else torch.as_tensor(mask).bool()
        if kept is not None and kept.shape != ids.shape:
            raise ValueError(
                f"attention_mask: got shape {tuple(kept.shape)} for {len(ids)} input_ids"
            )
        found = {}
        for name in sorted(given.keys() & self.names, key=lambda name: name != "input_ids"):
            x = torch.as_tensor(given[name])
            x = x.float() if x.is_floating_point() else x.long()
            if self._is_of_tokens(name, x):
                if len(x) != len(ids):
                    raise ValueError(
                        f"{name}: got shape {tuple(x.shape)} for {len(ids)} input_ids, expected "
                        "one for each token"
                        + (" (or labels='sequences')" if name == "labels" else "")
                    )
                x = (x if kept is None else x[kept])[: self.max_length]
            found[name] = x
        n = len(found["input_ids"])
        if not n:
            raise ValueError(
                "attention_mask: hides all tokens of a sequence, expected one at least"
            )
        if self.most_positions is not None and n > self.most_positions:
            raise ValueError(
                f"input_ids: got {n} tokens for {self.most_positions} positions of the model; "
                "expected shorter sequences, or a max_length at which they are cut"
            )
        return found


def _rows(batch: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The features of a padded batch."""
    if "attention_mask" not in batch:
        raise ValueError(
            f"collator: its batch has {', '.join(batch)}, expected attention_mask too, which "
            "tells tokens from padding"
        )
    names = [name for name, x in batch.items() if isinstance(x, Tensor)]
    return [{name: batch[name][i] for name in names} for i in range(len(batch["input_ids"]))]
