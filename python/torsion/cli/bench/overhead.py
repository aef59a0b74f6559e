"""What a step costs beside time: memory beyond parameters, gradients and state, and the time of ``import torsion``.

Both are measured in processes of their own. Run as a module, this file is such a process.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torsion.cli.bench.comparisons import Limit
from torsion.cli.bench.figures import Figure, Place
from torsion.cli.bench.lists import TensorList

__all__ = ["import_figure", "memory_figures"]

_OPTIMIZERS = {"tam": ("TAM", 1), "adatam": ("AdaTAMW", 2)}
"""Method -> class, tensors of state for each parameter."""

_CHUNK = 16384  # elements; the planner's unit
_IMPORT_LIMIT = Limit(0.5, ())
_IMPORT_PAIRS = 7


def _memory_limit(tensors: TensorList) -> Limit:
    chunks = sum(math.ceil(math.prod(shape) / _CHUNK) for shape in tensors.shapes)
    return Limit(2**20 + 64 * chunks, ())


def memory_figures(tensors: TensorList, methods: Sequence[str], place: Place) -> Iterator[Figure]:
    """Bytes at the peak of three steps beyond parameters, gradients and state."""
    for method in methods:
        if method not in _OPTIMIZERS:
            continue
        what = f"{_OPTIMIZERS[method][0]}: memory beyond parameters, gradients, state"
        note, used = "", None
        if place.device.type == "cuda":
            used = _cuda_peak(method, tensors, place.device)
        elif Path("/proc/self/clear_refs").exists():
            used = _child(method, tensors, place, "step") - _child(method, tensors, place, "state")
            note = "peak resident memory of a process that steps less that of one that only makes the state"
        else:
            note = "not measured: needs Linux's resettable peak of resident memory"
        yield Figure.at(place, what, tensors.name, "bytes", _memory_limit(tensors), value=used, note=note)


def _child(method: str, tensors: TensorList, place: Place, mode: str) -> int:
    task = json.dumps({"method": method, "shapes": tensors.shapes, "threads": place.threads, "mode": mode})
    command = [sys.executable, "-m", "torsion.cli.bench.overhead"]
    return int(subprocess.run(command, input=task, capture_output=True, text=True, check=True).stdout)


def _params(shapes: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    params = [torch.randn(tuple(shape), device=device).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def _optimizer(method: str, params: list[Tensor]) -> Any:
    import torsion

    return getattr(torsion, _OPTIMIZERS[method][0])(params, 1e-7)


def _cuda_peak(method: str, tensors: TensorList, device: torch.device) -> int:
    params = _params(tensors.shapes, device)
    optimizer = _optimizer(method, params)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(3):
        optimizer.step()
    torch.cuda.synchronize(device)
    # The allocator rounds every tensor up to 512 bytes.
    state = sum(math.ceil(4 * p.numel() / 512) * 512 for p in params) * _OPTIMIZERS[method][1]
    return torch.cuda.max_memory_allocated(device) - before - state


def _peak() -> int:
    """Largest resident memory since the last reset, in bytes (``ru_maxrss`` cannot be reset)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status")


def _make_state(method: str, params: list[Tensor]) -> list[dict[str, Tensor]]:
    """The tensors that an optimizer's state holds, as it holds them: scalars are views of shared tensors."""
    steps, shared = torch.zeros(len(params)), torch.zeros(1, 3)
    return [
        {
            "step": steps[i],
            **{str(k): torch.empty_like(p).fill_(1.0) for k in range(_OPTIMIZERS[method][1])},
            "correlation": shared[0, 0],
        }
        for i, p in enumerate(params)
    ]


def _measure_memory(task: dict[str, Any]) -> int:
    torch.set_num_threads(task["threads"])
    # A first small run brings in code, thread pools and their stacks, which are no part of a step.
    small = _optimizer(task["method"], _params([(70_000,), (1000,)], torch.device("cpu")))
    for _ in range(3):
        small.step()
    params = _params(task["shapes"], torch.device("cpu"))
    optimizer = _optimizer(task["method"], params)
    Path("/proc/self/clear_refs").write_text("5")
    before, kept = _peak(), None
    if task["mode"] == "state":
        kept = _make_state(task["method"], params)
    else:
        for _ in range(3):
            optimizer.step()
    used = _peak() - before
    del kept
    return used


def import_figure(place: Place) -> Figure:
    """Processor seconds of ``import torsion`` beyond ``import torch``, in processes that do one or the other in turn."""
    code = "import time; t = time.process_time(); import {}; print(time.process_time() - t)"

    def once(module: str) -> float:
        command = [sys.executable, "-c", code.format(module)]
        return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

    pairs = [(once("torch"), once("torsion")) for _ in range(min(_IMPORT_PAIRS, place.rounds))]
    extra = statistics.median(with_torsion - alone for alone, with_torsion in pairs)
    return Figure.at(
        place, "import torsion beyond import torch", "", "s", _IMPORT_LIMIT,
        value=extra, rounds=len(pairs), clock="process CPU time",
    )  # fmt: skip


if __name__ == "__main__":
    print(_measure_memory(json.load(sys.stdin)))
