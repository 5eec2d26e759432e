"""Functions run in processes of a gloo group of their own, once for all tests of a module.

    results = spawned(work, 4)    # [work(mesh), ...] by rank; work is a function of a module

A process imports the module of `work` by name, from tests/lib.
"""

from __future__ import annotations

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh


def spawned(work: Callable[..., Any], *shape: int, seconds: int = 120, names=None) -> list[Any]:
    """Returns what work(mesh) returned in each process; fails the test with its first traceback."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = torch.Size(shape).numel()
    with tempfile.TemporaryDirectory() as folder:
        processes = mp.spawn(_run, (port, folder, work, shape, names), nprocs=world, join=False)
        try:
            for _ in range(seconds):
                if processes.join(timeout=1):
                    break
            else:
                pytest.fail(f"{world} gloo processes have not finished within {seconds} s")
        except mp.ProcessExitedException:
            said = [x.read_text() for x in sorted(Path(folder).glob("*.txt"))]
            pytest.fail("\n".join(said) or "a gloo process ended")
        finally:
            for process in processes.processes:
                process.kill()
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(world)]


def _run(rank: int, port: int, folder: str, work: Any, shape: tuple[int, ...], names: Any) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    world = torch.Size(shape).numel()
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=90))
    try:
        result = work(init_device_mesh("cpu", shape, mesh_dim_names=names))
        torch.save(result, f"{folder}/{rank}.pt")
        dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        Path(f"{folder}/{rank}.txt").write_text(f"process {rank}: {traceback.format_exc()}")
        os._exit(1)
    os._exit(0)  # a thread of torch's may still run, and its destructor would abort the process
