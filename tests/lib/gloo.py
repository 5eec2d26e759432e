"""The computations of each of two processes over gloo.

A module of its own, because the processes of test_distributed.py import it by name.
"""

import os
from datetime import timedelta

import torch
import torch.distributed as dist
from encoders import BERT, MODERN, seeded
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from clinattn.encoder import SequenceClassifier

WORLD = 2
IDS = torch.randint(0, MODERN.vocab_size, (6, 40), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([40, 3, 17, 29, 40, 8])
TARGETS = torch.tensor([0, 1, 2, 2, 1, 0])
CASES = {  # configuration, layout, dtype of computation
    "ddp-bert-padded": (BERT, "padded", None),
    "ddp-modernbert-packed": (MODERN, "packed", None),
    "fsdp-bert-padded": (BERT, "padded", None),
    "fsdp-modernbert-packed": (MODERN, "packed", None),
    "fsdp-modernbert-packed-bf16": (MODERN, "packed", torch.bfloat16),
}


def loss_of(model, layout, rows=slice(None)):
    return model(IDS[rows], lengths=LENGTHS[rows], labels=TARGETS[rows], layout=layout).loss


def gradients(model):
    grads = {name: p.grad for name, p in model.named_parameters()}
    return {name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()}


def wrapped(model, case, mesh):
    if case.startswith("ddp"):
        return nn.parallel.DistributedDataParallel(model)
    policy = MixedPrecisionPolicy(param_dtype=CASES[case][2], reduce_dtype=torch.float32)
    for block in model.encoder.layers:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


def worker(rank, port, folder):
    """Computes every case in one group of processes: starting a group costs seconds."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60))
    mesh = init_device_mesh("cpu", (WORLD,))
    results = {}
    for case, (config, layout, _) in CASES.items():
        for run in range(2):
            model = wrapped(seeded(SequenceClassifier, config, 3), case, mesh)
            loss_of(model, layout, slice(rank, None, WORLD)).backward()
            prefix = "module." if case.startswith("ddp") else ""
            found = gradients(model)
            results[case, run] = {name.removeprefix(prefix): g for name, g in found.items()}
    if rank == 0:
        torch.save(results, f"{folder}/gradients.pt")
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # a thread of torch's may still run, and its destructor would abort the process
