"""Two processes over gloo: the gradients of one process, and the same bits in every run."""

import os
import socket
from contextlib import closing
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from encoders import BERT, MODERN, seeded
from support import assert_close
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from clinattn.encoder import SequenceClassifier

pytestmark = [
    pytest.mark.unpoisoned,
    pytest.mark.skipif(not dist.is_gloo_available(), reason="torch is built without gloo"),
]

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
    """Every case in one group of processes: starting one costs seconds."""
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
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    """Gradients by (case, run)."""
    folder = tmp_path_factory.mktemp("distributed")
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = mp.spawn(worker, (port, str(folder)), nprocs=WORLD, join=False)
    try:
        for _ in range(120):
            if processes.join(timeout=1):
                break
        else:
            pytest.fail("two gloo processes have not finished within two minutes")
    finally:
        for process in processes.processes:
            process.kill()
    return torch.load(folder / "gradients.pt")


def in_one_process(case, dtype, parts):
    """Gradients summed in fp32 at least over the parts of the batch, each with its mean loss."""
    config, layout, _ = CASES[case]
    model = seeded(SequenceClassifier, config, 3).to(dtype)
    total = {}
    for rows in parts:
        model.zero_grad()
        (loss_of(model, layout, rows) / len(parts)).backward()
        for name, grad in gradients(model).items():
            at_least_fp32 = grad.to(torch.promote_types(dtype, torch.float32))
            total[name] = total.get(name, 0) + at_least_fp32
    return total


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(case, distributed, threads):
    """To the bit where one process takes the halves of the batch in turn, close where it takes all.

    The mean of the halves' losses is that of the batch: each has three sequences.
    """
    threads(1)
    dtype = CASES[case][2] or torch.float32
    halves = in_one_process(case, dtype, [slice(rank, None, WORLD) for rank in range(WORLD)])
    actual = distributed[case, 0]
    assert actual.keys() == halves.keys()
    for name, grad in halves.items():
        assert torch.equal(actual[name], grad), name
    if dtype == torch.float32:
        truth = in_one_process(case, torch.float64, [slice(None)])
        whole = in_one_process(case, dtype, [slice(None)])
        for name, grad in truth.items():
            assert_close(name, actual[name], grad, whole[name])


@pytest.mark.parametrize("case", CASES)
def test_runs_agree_to_the_bit(case, distributed):
    for name, grad in distributed[case, 0].items():
        assert torch.equal(grad, distributed[case, 1][name]), name
