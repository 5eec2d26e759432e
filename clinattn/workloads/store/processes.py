"""Tasks in processes of their own, which end with the process that began them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, NamedTuple

Task = tuple[Any, ...]


def available() -> int:
    """The number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """Processes that tasks are given to, begun when they are needed; one alone is this process.

    On leaving the context they end, in the midst of a task where an error or Ctrl-C is the reason.
    """

    def __init__(self, processes: int):
        self.processes = processes
        self.begun: list[Worker] = []
        self.idle: list[Worker] = []
        self.busy: dict[Connection, tuple[Worker, int]] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.begun:
            worker.process.terminate()
        for worker in self.begun:
            worker.process.join()
            worker.pipe.close()

    def run(
        self, work: Callable[..., None], tasks: Sequence[Task], ended: Callable[[int], None]
    ) -> None:
        """Calls work(*task) for each task, and ended(number) after each, in any order.

        Raises the error of `work`, and ChildProcessError where a process was killed.
        """
        if self.processes == 1 or len(tasks) == 1 and not self.idle:
            for number, task in enumerate(tasks):
                work(*task)
                ended(number)
            return
        waiting = list(enumerate(tasks))[::-1]
        while waiting or self.busy:
            while waiting and len(self.busy) < self.processes:
                worker = self.idle.pop() if self.idle else self._begin()
                number, task = waiting.pop()
                self.busy[worker.pipe] = worker, number
                worker.pipe.send((work, task))
            ready = wait(list(self.busy))
            for pipe in [x for x in self.busy if x in ready]:
                worker, number = self.busy[pipe]
                worker.require_success()
                del self.busy[pipe]
                self.idle.append(worker)
                ended(number)

    def _begin(self) -> Worker:
        # A fork would take over locks of the threads of torch and Arrow.
        spawn = multiprocessing.get_context("spawn")
        pipe, other = spawn.Pipe()
        worker = Worker(spawn.Process(target=_serve, args=(other,), daemon=True), pipe)
        # Ctrl-C goes to all processes of a terminal: this one hears it, and ends the others, which
        # are begun deaf to it. The tracker's own beginning would unblock it.
        resource_tracker.ensure_running()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            worker.process.start()
            self.begun.append(worker)
            other.close()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return worker


class Worker(NamedTuple):
    """A process, and the pipe by which it gets tasks and answers for each."""

    process: BaseProcess
    pipe: Connection

    def require_success(self) -> None:
        """Raises what the task has raised."""
        try:
            error = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise ChildProcessError(
                f"a process was ended from outside (status {self.process.exitcode}), perhaps for "
                "want of memory: the same command goes on, and --processes says how many work at "
                "a time"
            ) from None
        if error is not None:
            raise error


def _serve(pipe: Connection) -> None:
    """The life of a process: tasks come by the pipe, and None or an error goes back for each."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with suppress(EOFError, OSError):  # of the pipe, when the other end is closed
        while True:
            work, task = pipe.recv()
            try:
                work(*task)
            except Exception as error:
                pipe.send(error)
            else:
                pipe.send(None)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)  # what is half written is left to the next run
