"""Trains an encoder on one timeline whose tokens are split over processes.

    torchrun --nproc-per-node 4 examples/split_sequence.py

Windowed layers exchange a halo of keys with their neighbours, others take the keys of one process
after the other. Without torchrun one process has all tokens; the losses agree within rounding.
"""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from clinattn import context_parallel
from clinattn.encoder import EncoderConfig, MaskedLanguageModel
from clinattn.parallel import shard

ALONE = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
TOKENS, MASK, STEPS = 4_096, 4, 30


def timeline(random):
    """Codes that last for a while: which one is masked follows from its neighbours."""
    codes = torch.arange(TOKENS) // 32 % 10 + 5
    masked = torch.rand(TOKENS, generator=random) < 0.2
    return codes.where(~masked, MASK), codes.where(masked, -100)


def main():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.update(ALONE | os.environ)
    mesh = init_device_mesh(device, (int(os.environ["WORLD_SIZE"]),))  # begins nccl or gloo, too
    torch.manual_seed(0)
    config = EncoderConfig(
        vocab_size=15, hidden_size=32, num_layers=3, num_heads=2, intermediate_size=32,
        max_positions=TOKENS, windows=(None, 8, 8), rotary_base=160_000.0,
    )  # fmt: skip
    model = DistributedDataParallel(MaskedLanguageModel(config).to(device))
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ends = torch.tensor([0, TOKENS], dtype=torch.int32, device=device)
    random = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        ids, labels = (shard(mesh, x).to(device) for x in timeline(random))
        with context_parallel(mesh):
            loss = model(ids, cu_seqlens=ends, labels=labels).loss
            loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        mean = loss.detach()
        dist.all_reduce(mean)
        if dist.get_rank() == 0:
            print(f"step {step} loss {mean.item() / mesh.size():.5f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
