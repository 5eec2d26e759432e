"""Small encoders of transformers, and sequences that they take padded and packed."""

import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

import clinattn

VOCABULARY, CLASSES = 60, 5
LENGTHS = (7, 40, 1, 23, 12, 30, 2, 17, 9, 26, 5)
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_attention_heads": 2,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_labels": CLASSES,
    "max_position_embeddings": 64,
}  # fmt: skip
SPECIAL = {"cls_token_id": 1, "bos_token_id": 1, "sep_token_id": 2, "eos_token_id": 2}
MORE = {
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
    "roberta": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "pad_token_id": 1},
    "modernbert": {
        "local_attention": 8, "global_attn_every_n_layers": 2, "pad_token_id": 0, **SPECIAL
    },
}  # fmt: skip


def model(name, head, replaced=True, dtype=torch.float32, **more):
    """A model of seeded weights, large enough that documents differ. head: "MaskedLM", say."""
    config = transformers.AutoConfig.for_model(name, **SIZES | MORE[name] | more)
    torch.manual_seed(3)
    cls = transformers.AutoModel if head == "" else getattr(transformers, f"AutoModelFor{head}")
    made = cls.from_config(config, attn_implementation="eager", dtype=dtype)
    torch.manual_seed(4)  # what was drawn above depends on the dtype
    with torch.no_grad():
        for weight in made.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn(weight.shape) * 0.2)  # drawn alike in every dtype
    if replaced:
        clinattn.replace_attention(made)
    return made


def features(head, count=11, seed=0, types=False):
    """Dicts of lists. labels: -100 for half of the tokens, or one for each sequence."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda low, high, *shape: torch.randint(low, high, shape, generator=generator)
    made = []
    for i in range(count):
        n = LENGTHS[i % len(LENGTHS)]
        x = {"input_ids": draw(3, VOCABULARY, n).tolist()}
        if types:
            x["token_type_ids"] = draw(0, 2, n).tolist()
        if head == "SequenceClassification":
            x["labels"] = int(draw(0, CLASSES))
        elif head:
            labels = draw(0, VOCABULARY if head == "MaskedLM" else CLASSES, n)
            x["labels"] = labels.where(draw(0, 2, n).bool(), -100).tolist()
        made.append(x)
    return made


def padded(rows, padding=0):
    """The padded batch of such features, as collators of transformers make it."""
    batch = {}
    for name in rows[0]:
        x = [torch.tensor(row[name]) for row in rows]
        fill = {"labels": -100, "input_ids": padding}.get(name, 0)
        stacked = x[0].dim() == 0
        batch[name] = torch.stack(x) if stacked else pad_sequence(x, True, padding_value=fill)
    ones = [torch.ones(len(row["input_ids"]), dtype=torch.long) for row in rows]
    return batch | {"attention_mask": pad_sequence(ones, True)}
