"""captum's LayerIntegratedGradients on an encoder of clinattn, beside clinattn.attribute.

Patients whose timeline has code 7 have a label, and scores of events show that code.
"""

import torch
from captum.attr import LayerIntegratedGradients

import clinattn
from clinattn.encoder import EncoderConfig, SequenceClassifier

torch.manual_seed(0)
config = EncoderConfig.preset(
    "tiny", vocab_size=40, hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64,
    windows=(None, None), pooling="mean",
)  # fmt: skip
model = SequenceClassifier(config, 2)
optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
for _ in range(200):
    codes = torch.randint(8, 40, (64, 16))
    labels = torch.rand(64).lt(0.5)
    codes[labels, torch.randint(16, (int(labels.sum()),))] = 7
    out = model(codes, labels=labels.long())
    optimizer.zero_grad()
    out.loss.backward()
    optimizer.step()
print(f"loss {out.loss:.3f}")
model.eval()
codes = codes[labels][:4]
baseline = torch.full_like(codes, 8)  # a code that says nothing
# captum takes the first dimension for that of examples, which packed tokens have not
forward = lambda x: model(x, layout="padded").logits
integrated = LayerIntegratedGradients(forward, model.encoder.embeddings)
theirs = integrated.attribute(codes, baseline, target=1, n_steps=32).sum(-1)
ours = clinattn.attribute(model, {"inputs": codes}, 1, "integrated_gradients", baseline=8)
for name, scores in (("captum", theirs), ("clinattn", ours)):
    shares = scores.where(codes == 7, 0).sum(1) / scores.abs().sum(1)
    print(*(f"{name} {share:.3f}" for share in shares.tolist()))
