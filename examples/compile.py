"""torch.compile: an encoder with clinattn is one graph, which serves batches of every length.

Prints the loss in eager and compiled, for lengths that were not seen before: nothing is recompiled.
"""

import torch
from torch._dynamo.utils import counters

from clinattn.encoder import EncoderConfig, MaskedLanguageModel

torch.manual_seed(0)
config = EncoderConfig.preset("tiny", vocab_size=200, hidden_size=48, num_layers=1, windows=(8,))
model = MaskedLanguageModel(config)
backend = "aot_eager"  # traces as "inductor" does, and needs no C++ compiler
compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=backend)
for lengths in ((50, 9), (31, 64, 12), (128, 17, 90, 40)):
    input_ids = torch.randint(5, 200, (len(lengths), max(lengths)))
    labelled = (torch.rand(input_ids.shape) < 0.15) & (
        torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    )
    batch = {"lengths": torch.tensor(lengths), "labels": input_ids.where(labelled, -100)}
    losses = []
    for call in (model, compiled):
        loss = call(input_ids.masked_fill(labelled, 4), **batch).loss
        loss.backward()
        losses.append(loss.item())
    graphs = counters["stats"]["unique_graphs"]
    print(f"lengths {lengths}: eager {losses[0]:.5f}, compiled {losses[1]:.5f}, graphs {graphs}")
