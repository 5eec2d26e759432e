"""Replaced models of transformers, rows split over processes; a module to import."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from adapted import randomized
from torch import Tensor, nn

from clinattn import context_parallel, replace_attention
from clinattn.parallel import gather, shard

TOKENS = 101
ENDS = torch.tensor((0, 30, 31, 101), dtype=torch.int32)
RANDOM = torch.Generator().manual_seed(3)
IDS = torch.randint(2, 50, (1, TOKENS), generator=RANDOM)
# Of one set of labels the error of a gradient can be one number's luck (tests/lib/adapted.py).
LABELS = [IDS.where(torch.rand(1, TOKENS, generator=RANDOM) < 0.3, -100) for _ in range(4)]
SMALL = {
    "vocab_size": 50, "hidden_size": 24, "num_attention_heads": 3, "num_hidden_layers": 3,
    "intermediate_size": 20, "max_position_embeddings": 128, "pad_token_id": 1,
}  # fmt: skip
# Class, configuration, and whether the row holds documents.
MODELS = {
    "modernbert": ("ModernBert", {"global_attn_every_n_layers": 3, "local_attention": 16}, False),
    "modernbert-documents": (
        "ModernBert", {"global_attn_every_n_layers": 3, "local_attention": 80}, True
    ),
    "bert": ("Bert", {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}, False),
    "bert-documents": (
        "Bert", {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}, True
    ),
}  # fmt: skip


def made(name: str) -> nn.Module:
    import transformers

    kind, settings, _ = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**SMALL, **settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForMaskedLM")(config)
    return randomized(model).train()


def documents(name: str) -> dict[str, Tensor]:
    """Arguments of the whole row: positions by token, and ends where it holds documents."""
    position_ids, words = torch.arange(TOKENS)[None], {}
    if MODELS[name][2]:
        starts = torch.repeat_interleave(ENDS[:-1], ENDS.diff())
        position_ids = position_ids - starts
        words = {"cu_seq_lens_q": ENDS, "cu_seq_lens_k": ENDS}
        words |= {"max_length_q": 70, "max_length_k": 70}
    return {"position_ids": position_ids, **words}


def results(model: nn.Module, ids: Tensor, labels: Tensor, words: dict[str, Any]) -> Any:
    """Logits, and the sum of the losses."""
    logits = model(ids, **words).logits
    return logits, F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / TOKENS


def whole(
    name: str, dtype: torch.dtype = torch.float32, backwards: bool = False
) -> dict[str, Tensor]:
    """Results of one process. backwards: of the row in reverse order, which changes sums alone."""
    model, words = made(name).to(dtype), documents(name)
    replace_attention(model)
    given = [IDS, *LABELS, words["position_ids"]]
    if backwards:
        given = [x.flip(1) for x in given]
        words |= {n: TOKENS - x.flip(0) for n, x in words.items() if n.startswith("cu_")}
    ids, *labels, words["position_ids"] = given
    grads: dict[str, list[Tensor]] = {n: [] for n, _ in model.named_parameters()}
    for x in labels:
        model.zero_grad()
        logits, loss = results(model, ids, x, words)
        loss.backward()
        for n, p in model.named_parameters():
            grads[n].append(p.grad)
    logits = logits.detach().flip(1) if backwards else logits.detach()
    return {"logits": logits} | {n: torch.stack(x) for n, x in grads.items()}


def split_transformers(mesh: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in MODELS:
        model, words = made(name), documents(name)
        assert not replace_attention(model).kept
        words["position_ids"] = shard(mesh, words["position_ids"], 1)
        grads: dict[str, list[Tensor]] = {n: [] for n, _ in model.named_parameters()}
        for labels in LABELS:
            model.zero_grad()
            with context_parallel(mesh):
                logits, loss = results(model, shard(mesh, IDS, 1), shard(mesh, labels, 1), words)
                loss.backward()
            for n, p in model.named_parameters():
                torch.distributed.all_reduce(p.grad, group=mesh.get_group())
                grads[n].append(p.grad)
        found[name] = {"logits": gather(mesh, logits.detach(), 1)}
        found[name] |= {n: torch.stack(x) for n, x in grads.items()}
    return found | {"refused": refusals(mesh)}


def refusals(mesh: Any) -> list[str]:
    """Returns the errors of calls that a part of the row would give another meaning."""
    part = lambda x: shard(mesh, x, 1)
    restarted = documents("modernbert-documents")["position_ids"]
    said = []
    for name, words in (
        ("bert", {"position_ids": torch.arange(part(IDS).shape[1])[None]}),
        ("bert", {"position_ids": part(restarted)}),
        ("bert", {"attention_mask": torch.ones_like(part(IDS))}),
        ("modernbert", {"attention_mask": torch.ones_like(part(IDS))}),
    ):
        model = made(name)
        replace_attention(model)
        try:
            with context_parallel(mesh):
                model(part(IDS), **words)
            said.append("")
        except (ValueError, NotImplementedError) as error:
            said.append(str(error))
    return said
