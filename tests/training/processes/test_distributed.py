"""Two processes over gloo: the gradients of one process, and the same bits in every run."""

import socket
from contextlib import closing

import pytest
import torch
import torch.multiprocessing as mp
from encoders import seeded
from gloo import CASES, WORLD, gradients, loss_of, worker
from needs import GLOO
from support import assert_close

from clinattn.encoder import SequenceClassifier
from clinattn.encoder import model as encoder

pytestmark = [
    pytest.mark.unpoisoned,
    GLOO,
]

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
def test_gradients_are_those_of_one_process(case, distributed, threads, monkeypatch):
    """To the bit where one process takes the halves of the batch in turn, close where it takes all.

    The mean of the halves' losses is that of the batch: each has three sequences. FSDP rounds what
    enters a layer to bf16, so that the residual stream is bf16 there.
    """
    threads(1)
    dtype = CASES[case][2] or torch.float32
    if dtype == torch.bfloat16:
        monkeypatch.setattr(encoder, "serves_stream", lambda x: False)
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
