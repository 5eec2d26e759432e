"""A model as MEDS-EIC-AR builds it: a Llama of padded codes, whose attention one name chooses.

Where that project says attn_implementation="flash_attention_2", "clinattn" is to be said.
"""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from clinattn.integrations.transformers import register


def llama(implementation, layers=4, heads=4, vocabulary=64, positions=256, head_dim=64):
    """The sizes are those of its preset `micro`."""
    config = LlamaConfig(
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
        hidden_size=heads * head_dim, intermediate_size=4 * heads * head_dim, head_dim=head_dim,
        vocab_size=vocabulary, max_position_embeddings=positions, attention_dropout=0.0,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


if __name__ == "__main__":
    register()
    torch.manual_seed(0)
    model = llama("clinattn", layers=2, heads=2, head_dim=16)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    lengths = torch.tensor([[200], [90], [31]])
    codes = (torch.arange(200) ** 2 % 60 + 1).masked_fill(torch.arange(200) >= lengths, 0)
    for step in range(41):
        labels = codes.masked_fill(codes == 0, -100)
        loss = model(codes, attention_mask=codes != 0, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step:2}  loss {loss:.3f}")
