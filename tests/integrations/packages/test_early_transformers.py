"""ModernBERT and T5 of transformers 5.0, beyond what every architecture is compared for."""

import pytest
import torch
import transformers

import clinattn
from clinattn.integrations.transformers.early_transformers import REPLACEMENTS, adapt, restore
from clinattn.tools.model_report.architectures import find

pytestmark = pytest.mark.skipif(not REPLACEMENTS, reason="both ask the registry in this release")


@pytest.mark.parametrize("name", ["modernbert", "t5"])
def test_undone_the_classes_are_what_they_were(name):
    model = find(name).build().eval()
    before = [type(x) for x in model.modules()]
    report = clinattn.replace_attention(model)
    assert len(report.replaced) == find(name).attentions and not report.kept
    assert sum(type(x) in REPLACEMENTS.values() for x in model.modules()) == len(report.replaced)
    report.undo()
    assert [type(x) for x in model.modules()] == before


def test_attentions_asked_for_are_those_of_transformers():
    model = find("t5").build().eval()
    batch = find("t5").batch(model.config, (7, 12), "right")
    expected = model(**batch.inputs, output_attentions=True)
    clinattn.replace_attention(model)
    with pytest.warns(RuntimeWarning, match="T5Attention: attention probabilities"):
        actual = model(**batch.inputs, output_attentions=True)
    for name in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        assert all(map(torch.equal, actual[name], expected[name]))


def test_what_was_built_for_flash_attention_is_kept():
    (module, *_) = [x for x in find("modernbert").build().modules() if type(x) in REPLACEMENTS]
    module.rotary_emb = torch.nn.Identity()  # as without padding
    outcome = adapt(module)
    assert not outcome.replaced and "flash_attention_2" in outcome.detail
    assert not restore(module)


@pytest.mark.parametrize("cls", ["ModernBertForMaskedLM", "ModernBertForTokenClassification"])
def test_heads_are_served(cls):
    architecture = find("modernbert")
    model = architecture.build(head=cls).eval()
    ids = torch.randint(5, 103, (2, 23), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(23) < torch.tensor([[23], [11]])).long()
    expected = model(ids, attention_mask=mask).logits
    clinattn.replace_attention(model)
    actual = model(ids, attention_mask=mask).logits
    assert type(model) is getattr(transformers, cls)
    torch.testing.assert_close(actual[mask == 1], expected[mask == 1], rtol=1e-4, atol=1e-5)
