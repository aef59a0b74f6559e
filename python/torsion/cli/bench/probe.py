"""A process that makes an optimizer's state or takes its steps, and says by how much its memory grew.

Runs as ``python -m torsion.cli.bench.probe``: a JSON task on standard input, JSON on standard output.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

__all__ = ["make_params", "make_step"]

_INNER = 5  # inner steps of a cycle


def make_params(shapes: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
    """Parameters with gradients, every page of them written."""
    params = [torch.randn(tuple(shape), device=device).requires_grad_() for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def make_step(name: str, params: list[Tensor]) -> Callable[[], object]:
    """A step of an optimizer of torsion by its class's name, for "Lookbehind" a cycle around SGD with momentum."""
    import torsion

    if name != "Lookbehind":
        step: Callable[[], object] = getattr(torsion, name)(params, 1e-7).step
        return step
    optimizer = torsion.Lookbehind(torch.optim.SGD(params, 1e-7, 0.9), k=_INNER)

    def cycle() -> None:
        optimizer.ascent_step()
        for _ in range(_INNER):
            optimizer.descent_step()

    return cycle


def _bare_state(params: list[Tensor], per_parameter: int) -> list[dict[str, Tensor]]:
    """The tensors of a state, held as an optimizer holds them: scalars are views of tensors shared by all."""
    steps, shared = torch.zeros(len(params)), torch.zeros(1, 3)
    states = []
    for i, p in enumerate(params):
        buffers = {f"buffer {k}": torch.empty_like(p).fill_(1.0) for k in range(per_parameter)}
        states.append({"step": steps[i], **buffers, "correlation": shared[0, 0]})
    return states


def _status(field: str) -> int:
    """VmHWM, the peak since the last reset (``ru_maxrss`` has no reset), or VmRSS, the memory of now; in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def _trim() -> None:
    """Give freed memory back to the system, that none of it hides what is allocated next."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc alone has it
    if trim is not None:
        trim(0)


def _grown(task: dict[str, Any]) -> dict[str, int]:
    torch.set_num_threads(task["threads"])
    # A first small run brings in code, thread pools and their stacks, which are no part of a step.
    small = make_step(task["optimizer"], make_params([(70_000,), (1000,)], torch.device("cpu")))
    for _ in range(3):
        small()
    params = make_params(task["shapes"], torch.device("cpu"))
    step = make_step(task["optimizer"], params)
    _trim()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = _status("VmRSS")
    held = None
    if task["steps"]:
        for _ in range(task["steps"]):
            step()
    else:
        held = _bare_state(params, task["states"])
    peak = _status("VmHWM") - before
    _trim()
    found = {"peak": peak, "held": _status("VmRSS") - before}
    del held
    return found


if __name__ == "__main__":
    print(json.dumps(_grown(json.load(sys.stdin))))
