"""Processes that stay, and run one task after the other together."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

import tiny_models

#: seconds that the processes may take to start
START = 600.0
#: and how long the others have to end a task when one has raised
GRACE = 10.0


def _worker(rank: int, processes: int, folder: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    meet = f"file://{folder}/meet"
    timeout = timedelta(minutes=30)  # what a task may take, `Pool` decides
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=processes, timeout=timeout)
    tiny_models.llama()  # imports take a while
    pipe.send("ready")
    while True:
        task = pipe.recv()
        if task is None:
            break
        try:
            pipe.send(("seen", task()))
        except Exception as error:
            pipe.send(("raised", f"{type(error).__name__}: {error}", traceback.format_exc()))
    dist.destroy_process_group()


class Pool:
    """Processes that run one task after the other together. Where they do not end it alike they are replaced."""

    def __init__(self, processes: int = 2):
        self.processes = processes
        self._running: list[tuple[Any, Any]] = []

    def run(self, task: Callable[[], Any], limit: float = 60.0) -> list[tuple[Any, ...]]:
        """What each process answers: `("seen", value)`, `("raised", message, traceback)` or `("no answer",)`.

        Args:
            task: a function of a module; all processes call it.
            limit: seconds.
        """
        if not self._running:
            self._start()
        for _, pipe in self._running:
            pipe.send(task)
        answers: list[tuple[Any, ...]] = [("no answer",)] * self.processes
        end = time.monotonic() + limit
        waiting = set(range(self.processes))
        while waiting and time.monotonic() < end:
            for rank in list(waiting):
                process, pipe = self._running[rank]
                if pipe.poll(0.02):
                    answers[rank] = pipe.recv()
                    waiting.discard(rank)
                    if answers[rank][0] == "raised":  # the others wait for it, perhaps for ever
                        end = min(end, time.monotonic() + GRACE)
                elif not process.is_alive():
                    answers[rank], end = ("no answer",), min(end, time.monotonic() + GRACE)
                    waiting.discard(rank)
        if len({answer[:2] if answer[0] == "raised" else answer[0] for answer in answers}) > 1 or not all(
            answer[0] in ("seen", "raised") for answer in answers
        ):
            self.close(kill=True)  # they are not at the same place any more
        return answers

    def _start(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        folder = tempfile.mkdtemp()
        for rank in range(self.processes):
            here, there = context.Pipe()
            process = context.Process(target=_worker, args=(rank, self.processes, folder, there), daemon=True)
            process.start()
            self._running.append((process, here))
        for _, pipe in self._running:
            if not pipe.poll(START) or pipe.recv() != "ready":
                raise RuntimeError("The processes do not start.")

    def close(self, kill: bool = False) -> None:
        for process, pipe in self._running:
            if kill:
                process.kill()
            else:
                pipe.send(None)
            process.join(10)
        self._running = []
