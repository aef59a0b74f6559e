"""Two processes in one group, for tests of data-parallel training."""

from __future__ import annotations

import contextlib
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2
PATIENCE = 60.0
"""Seconds until a collective that one rank never joins counts as failed."""


def _worker(rank: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLD))
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD, timeout=timedelta(seconds=PATIENCE)
    )
    while True:
        task = pipe.recv()
        if task is None:
            break
        function, arguments = task
        torch.manual_seed(0)
        try:
            pipe.send((True, function(rank, *arguments)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()


class Workers:
    """Two processes in one group; ``run`` calls a function in both and returns both results."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.started = folder, 0
        self.processes: list[Any] = []
        self.pipes: list[Connection] = []

    def start(self) -> None:
        context = mp.get_context("spawn")
        store = self.folder / f"store{self.started}"
        self.started += 1
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(rank, str(store), theirs), daemon=True)
            process.start()
            self.processes.append(process)
            self.pipes.append(ours)

    def stop(self) -> None:
        for pipe in self.pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self.processes, self.pipes = [], []

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        if not self.processes:
            self.start()
        for pipe in self.pipes:
            pipe.send((function, arguments))
        results = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(2 * PATIENCE):
                results.append((False, f"rank {rank} did not answer"))
                continue
            results.append(pipe.recv())
        failed = [f"rank {rank}: {result}" for rank, (good, result) in enumerate(results) if not good]
        if failed:
            self.stop()  # the ranks no longer agree on which collective comes next
            pytest.fail("\n".join(failed), pytrace=False)
        return [result for _, result in results]
