"""Differentially private training: gradients of each sample, as if it had been alone."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from encoders import BERT, MODERN, seeded
from torch import nn

from clinattn import fused_attention
from clinattn.encoder import MaskedLanguageModel, SequenceClassifier

opacus = pytest.importorskip("opacus")
from opacus.grad_sample.utils import wrap_model  # noqa: E402
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping  # noqa: E402
from opacus.validators import ModuleValidator  # noqa: E402

pytestmark = [
    pytest.mark.unpoisoned,
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
]

LENGTHS = torch.tensor([23, 1, 9, 17])
IDS = torch.randint(0, MODERN.vocab_size, (4, 23), generator=torch.Generator().manual_seed(1))
TARGETS = torch.tensor([0, 1, 1, 2])
WITH_GRAD_SAMPLES = ("hooks", "functorch", "ew")


class Around(nn.Module):
    """Parameters in linear children alone; attention between them has none."""

    def __init__(self, dropout_p=0.0):
        super().__init__()
        self.qkv, self.out, self.dropout_p = nn.Linear(12, 36), nn.Linear(12, 5), dropout_p

    def attend(self, qkv):
        q, k, v = qkv.unflatten(-1, (3, 2, 6)).transpose(1, 3).unbind(2)
        o = fused_attention(q, k, v, is_causal=True, dropout_p=self.dropout_p)
        return o.transpose(1, 2).flatten(2)

    def forward(self, x):
        return self.out(self.attend(self.qkv(x)))


class Direct(Around):
    """Owns a Parameter: Opacus runs the whole module under vmap and torch.func.grad."""

    def __init__(self, dropout_p=0.0):
        super().__init__(dropout_p)
        self.temperature = nn.Parameter(torch.rand(36))

    def forward(self, x):
        return self.out(self.attend(self.qkv(x) * self.temperature))


def one_by_one(model, loss, samples):
    """Gradients of each sample in a batch of its own, by parameter."""
    grads = [torch.autograd.grad(loss(model, i), list(model.parameters())) for i in samples]
    return [torch.stack(x) for x in zip(*grads, strict=True)]


def assert_close(actual, expected):
    """fp32: sums in another order, of terms as large as the largest gradient."""
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max() + 1))


@pytest.mark.parametrize(
    "kind, mode",
    [(Around, mode) for mode in WITH_GRAD_SAMPLES] + [(Direct, "hooks"), (Direct, "functorch")],
)
def test_modules_of_ones_own(kind, mode):
    """Expanded weights ("ew") have no rule for a Parameter that is used outside torch's modules."""
    model, x = kind(), torch.randn(5, 9, 12)
    expected = one_by_one(model, lambda m, i: m(x[i : i + 1]).square().sum(), range(5))
    private = wrap_model(copy.deepcopy(model), grad_sample_mode=mode, loss_reduction="sum")
    private(x).square().sum().backward()
    assert_close([p.grad_sample for p in private.parameters()], expected)


def classifier_gradients(model):
    """Returns the gradients of each patient alone, without padding."""

    def loss(model, i):
        n = int(LENGTHS[i])
        output = model(IDS[i : i + 1, :n], lengths=LENGTHS[i : i + 1], labels=TARGETS[i : i + 1])
        return output.loss

    return one_by_one(model, loss, range(4))


CONFIGS = {"modernbert": MODERN, "bert": BERT}


@pytest.mark.parametrize("mode", WITH_GRAD_SAMPLES)
@pytest.mark.parametrize("name", CONFIGS)
def test_encoder(name, mode):
    model = seeded(SequenceClassifier, CONFIGS[name], 3)
    assert ModuleValidator.validate(model) == []
    expected = classifier_gradients(model)
    private = wrap_model(copy.deepcopy(model), grad_sample_mode=mode)
    private(IDS, lengths=LENGTHS, labels=TARGETS, layout="padded").loss.backward()
    assert_close([p.grad_sample for p in private.parameters()], expected)


@pytest.mark.parametrize("name", CONFIGS)
def test_ghost_clipping_of_the_encoder(name):
    """Norms of the samples' gradients without the gradients, then the clipped sum."""
    model = seeded(SequenceClassifier, CONFIGS[name], 3)
    expected = classifier_gradients(model)
    private = wrap_model(copy.deepcopy(model), grad_sample_mode="ghost", max_grad_norm=0.5)
    optimizer = opacus.optimizers.DPOptimizerFastGradientClipping(
        torch.optim.SGD(private.parameters(), lr=1.0),
        noise_multiplier=0.0,
        max_grad_norm=0.5,
        expected_batch_size=4,
    )
    criterion = DPLossFastGradientClipping(private, optimizer, nn.CrossEntropyLoss())
    criterion(private(IDS, lengths=LENGTHS, layout="padded").logits, TARGETS).backward()
    norms = sum(x.flatten(1).square().sum(1) for x in expected).sqrt()
    torch.testing.assert_close(private.per_sample_gradient_norms, norms, rtol=1e-4, atol=1e-5)
    factors = (0.5 / norms).clamp(max=1.0)
    clipped = [(x.movedim(0, -1) * factors).sum(-1) for x in expected]
    assert_close([p.grad for p in private.parameters()], clipped)


def test_masked_language_model_with_a_loss_of_all_logits():
    """The embedding is used twice, at both ends of the model."""
    model = seeded(MaskedLanguageModel, BERT)
    masked = torch.rand(IDS.shape) < 0.4

    def loss(model, rows, reduction="sum"):
        n = int(LENGTHS[rows].max())
        logits = model(IDS[rows, :n], lengths=LENGTHS[rows], layout="padded").logits
        chosen = masked[rows, :n] & (torch.arange(n) < LENGTHS[rows, None])
        return (F.cross_entropy(logits.mT, IDS[rows, :n], reduction="none") * chosen).sum()

    expected = one_by_one(model, lambda m, i: loss(m, slice(i, i + 1)), range(4))
    private = wrap_model(copy.deepcopy(model), grad_sample_mode="hooks", loss_reduction="sum")
    loss(private, slice(None)).backward()
    assert_close([p.grad_sample for p in private.parameters()], expected)


def test_private_training_of_the_encoder():
    """PrivacyEngine.make_private, Poisson batches and noise; loss falls, budget is spent."""
    config = replace(BERT, num_layers=1, hidden_size=16, num_heads=2, windows=())
    model = SequenceClassifier(config, 2)
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(64) % 2
    ids = torch.randint(2, 50, (64, 12), generator=generator)
    ids[:, 0] = labels
    lengths = torch.randint(1, 13, (64,), generator=generator)
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(ids, lengths, labels), batch_size=32
    )
    engine = opacus.PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.Adam(model.parameters(), 5e-3),
        data_loader=loader,
        noise_multiplier=0.3,
        max_grad_norm=1.0,
        noise_generator=generator,
    )
    losses = []
    for _ in range(15):
        for ids, lengths, labels in loader:
            optimizer.zero_grad()
            output = model(ids, lengths=lengths, labels=labels, layout="padded")
            output.loss.backward()
            optimizer.step()
            losses.append(output.loss.item())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert 0 < engine.get_epsilon(1e-3) < float("inf")


@pytest.mark.parametrize("packed", [{"lengths": LENGTHS}, {"lengths": LENGTHS, "layout": "packed"}])
def test_packing_is_refused_because_it_hides_the_samples(packed):
    private = wrap_model(SequenceClassifier(MODERN, 3), grad_sample_mode="hooks")
    with pytest.raises(ValueError, match="layout='padded'"):
        private(IDS, **packed)
    with torch.no_grad():
        assert private(IDS, **packed).logits.shape == (4, 3)
    private.eval()
    assert private(IDS, **packed).logits.shape == (4, 3)


def test_labels_are_refused_where_they_pick_tokens():
    private = wrap_model(MaskedLanguageModel(MODERN), grad_sample_mode="hooks")
    with pytest.raises(ValueError, match="labels: got some under per-sample gradients"):
        private(IDS, lengths=LENGTHS, layout="padded", labels=IDS)


def test_attention_dropout_under_functorch_is_refused():
    """Opacus runs vmap with randomness="error"; its hooks around attention have no such limit."""
    x = torch.randn(5, 9, 12)
    around = wrap_model(Around(dropout_p=0.5), grad_sample_mode="hooks")
    around(x).sum().backward()
    assert all(p.grad_sample.isfinite().all() for p in around.parameters())
    direct = wrap_model(Direct(dropout_p=0.5), grad_sample_mode="hooks")
    with pytest.raises(RuntimeError, match="randomness"):
        direct(x).sum().backward()
