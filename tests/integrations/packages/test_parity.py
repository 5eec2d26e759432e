"""Models of transformers compute what they did before their attention was replaced.

Sabotage at the end: the comparison itself notices what may go wrong.
"""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from parity_table import (  # noqa: E402
    DTYPES,
    LENGTHS,
    MODES,
    compare_architecture,
)

from clinattn.integrations.replace import replace_attention  # noqa: E402
from clinattn.tools.model_report.architectures import (  # noqa: E402
    ARCHITECTURES,
    KEPT,
    REPLACED,
    find,
)
from clinattn.tools.model_report.parity import compare  # noqa: E402

CASES = [
    pytest.param(architecture, padding, id=f"{architecture.name}-{padding}")
    for architecture in REPLACED
    for padding in architecture.paddings
]
by_name = pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)


@pytest.fixture(autouse=True)
def known(request):
    """Skips what the installed transformers is too old for."""
    architecture = getattr(request.node, "callspec", None)
    architecture = architecture and architecture.params.get("architecture")
    if architecture and not architecture.available():
        pytest.skip(f"transformers {transformers.__version__} has no {architecture.model}")


def batch_for(architecture, model, padding):
    torch.manual_seed(1)
    return architecture.batch(model.config, LENGTHS, padding)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("architecture, padding", CASES)
def test_outputs_and_gradients_are_those_of_eager_attention(architecture, padding, dtype):
    for mode in MODES:
        row = compare_architecture(architecture, dtype, mode, padding, replace_attention)
        assert row.calls == architecture.expected_calls(padding), row
        assert (row.replaced, row.attentions) == (architecture.attentions,) * 2, row
        assert row.passed, row


@pytest.mark.parametrize("architecture", KEPT, ids=lambda a: a.name)
def test_what_is_not_replaced_is_named_and_left_as_it_is(architecture):
    model = architecture.build().eval()
    batch = batch_for(architecture, model, "left")
    before = model(**batch.inputs).last_hidden_state
    report = replace_attention(model)
    assert report.replaced == []
    assert len(report.kept) == architecture.attentions
    assert all(entry.reason and entry.type and entry.name for entry in report.kept), report
    assert torch.equal(model(**batch.inputs).last_hidden_state, before)


@by_name
def test_attention_dropout_is_drawn_in_training_alone(architecture):
    """Eval mode is deterministic, and as without dropout; in training the seed decides."""
    model = architecture.build(dropout=0.3)
    replace_attention(model)
    batch = batch_for(architecture, model, architecture.paddings[-1])
    run = lambda: next(iter(model(**batch.inputs).values()))

    model.train()
    drawn = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        drawn.append(run())
    drawn[0].square().mean().backward()
    assert drawn[0].isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])

    without = architecture.build()
    without.load_state_dict(model.state_dict())  # running averages of batch norms, too
    replace_attention(without)
    model.eval()
    kept = run()
    assert torch.equal(kept, run())
    model = without.eval()
    assert torch.equal(kept, run())


def scaled(attention):
    def sabotaged(module, query, key, value, mask, *, scaling=None, **words):
        return attention(module, query, key, value, mask, scaling=scaling * 1.5, **words)

    return sabotaged


def without_mask(attention):
    return lambda module, query, key, value, mask, **words: attention(
        module, query, key, value, None, **words
    )


def without_window(attention):
    return lambda module, query, key, value, mask, **words: attention(
        module, query, key, value, None, **(words | {"sliding_window": None})
    )


def heads_in_another_order(attention):
    return lambda module, query, key, value, mask, **words: attention(
        module, query, key.flip(1), value.flip(1), mask, **words
    )


def without_key_gradient(attention):
    return lambda module, query, key, value, mask, **words: attention(
        module, query, key.detach(), value, mask, **words
    )


def not_at_all(attention):
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward


SABOTAGES = [
    ("bert", "none", scaled),
    ("bert", "left", without_mask),
    ("bert", "right", without_mask),
    ("llama", "left", without_mask),
    ("llama", "none", heads_in_another_order),
    ("modernbert", "none", without_window),
    ("mistral", "right", without_window),
    ("bert", "none", without_key_gradient),
    ("bert", "none", not_at_all),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "name, padding, sabotage", SABOTAGES, ids=[f"{n}-{p}-{s.__name__}" for n, p, s in SABOTAGES]
)
def test_the_comparison_notices(name, padding, sabotage, dtype, monkeypatch):
    from clinattn.integrations.transformers import early_transformers
    from clinattn.integrations.transformers import registry as integration

    if name == "modernbert" and early_transformers.REPLACEMENTS:
        pytest.skip("ModernBERT of this release does not ask the registry")
    # undone in reverse, so that what was registered meanwhile goes, too
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, integration.NAME, None)
    monkeypatch.setattr(integration, "attention", sabotage(integration.attention))
    row = compare_architecture(find(name), dtype, "train", padding, replace_attention)
    assert not row.passed, row


def test_the_compared_model_is_left_as_it_was():
    architecture = find("bert")
    model = architecture.build()
    before = copy.deepcopy(model.state_dict())
    batch = batch_for(architecture, model, "left")
    parity = compare(model, batch, replace_attention, training=False, gradients=True)
    assert parity.calls == 2
    assert model.config._attn_implementation == "eager"
    assert all(p.grad is None for p in model.parameters())
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
