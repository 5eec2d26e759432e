"""Processes that train together again and again: their imports take longer than small runs do.

A module of its own, because the processes import it by name.
"""

from __future__ import annotations

import os
import socket
import traceback
from contextlib import closing
from typing import Any

import torch
import torch.multiprocessing as mp


class Processes:
    """`most` processes; a run takes the first few of them for its ranks."""

    def __init__(self, most: int):
        context = mp.get_context("spawn")
        self.orders = [context.Queue() for _ in range(most)]
        self.answers = context.Queue()
        self.processes = [
            context.Process(target=work, args=(rank, orders, self.answers), daemon=True)
            for rank, orders in enumerate(self.orders)
        ]
        for process in self.processes:
            process.start()

    def train(self, world: int, settings: Any) -> list[str]:
        """Runs a Trainer on `world` ranks to its end; returns what rank 0 has said."""
        answers = self._answers(world, settings)
        wrong = [error for error, _ in answers if error]
        assert not wrong, "\n".join(wrong)
        return answers[0][1]

    def failing(self, world: int, settings: Any) -> list[str]:
        """Returns the traceback of each rank of a run that ends in errors."""
        return [error for error, _ in self._answers(world, settings)]

    def _answers(self, world: int, settings: Any) -> list[tuple[str, list[str]]]:
        """The traceback, "" without one, and what was said, of each rank."""
        with closing(socket.socket()) as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        for orders in self.orders[:world]:
            orders.put((world, port, settings))
        answers = sorted(self.answers.get(timeout=120) for _ in range(world))
        return [(error, said) for _, error, said in answers]

    def end(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def work(rank: int, orders: Any, answers: Any) -> None:
    from clinattn.training.loop import Trainer
    from clinattn.training.ranks import joined

    torch.set_num_threads(1)
    while True:
        world, port, settings = orders.get()
        os.environ |= {"WORLD_SIZE": str(world), "RANK": str(rank), "MASTER_ADDR": "127.0.0.1"}
        os.environ["MASTER_PORT"] = str(port)
        said: list[str] = []
        try:
            with joined("cpu") as (ranks, device):
                Trainer(settings, ranks, device, say=said.append).run()
            answers.put((rank, "", said))
        except BaseException:
            answers.put((rank, traceback.format_exc(), said))
