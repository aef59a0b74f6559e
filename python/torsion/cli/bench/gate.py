"""The gate: nobody's speed is reported before it has computed the right thing on the very tensors it is timed on."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from torsion.cli.bench.contestants import Builder, Contestant
from torsion.cli.bench.lists import TensorList
from torsion.cli.bench.problem import Gradients, attach, initial
from torsion.cli.bench.timing import Turn

__all__ = ["GateError", "check"]

_STEPS = 3  # momentum starts at the first, the cosine at the second, its memory at the third
_CYCLES = 2  # the second starts from the first's slow weights and momentum
_LR = 0.1  # large against the timed rate: parameters then move by much more than their last digit

_ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Of the largest parameter: each of three steps, or of a cycle's phases, rounds it once."""


class GateError(Exception):
    """A contestant does not compute what it is named after; nothing it did may be reported."""


def check(contestants: Iterable[Contestant], tensors: TensorList, gradients: Gradients, device: torch.device) -> None:
    """Take three steps, or two cycles, with each contestant and its judge in float64; compare every parameter.

    Raises:
        GateError: a parameter is further off than float32 explains; names contestant, list, tensor and error.
    """
    by_judge: dict[Builder, list[Contestant]] = {}
    for contestant in dict.fromkeys(contestants):
        if contestant.judge is not None:
            by_judge.setdefault(contestant.judge, []).append(contestant)
    start = [p.detach() for p in initial(tensors, device)]
    for judge, judged in by_judge.items():
        with _idle_processors():
            right = _run(judge, start, gradients, torch.float64)
        for contestant in judged:
            _compare(contestant, tensors, _run(contestant.build, start, gradients, torch.float32), right, start)


@contextlib.contextmanager
def _idle_processors() -> Iterator[None]:
    # For the judges alone: what a compiler makes of a contestant may hold the number of threads. Busy processors are
    # left out, because every kernel waits for its last thread.
    before = torch.get_num_threads()
    busy = math.ceil(os.getloadavg()[0]) if hasattr(os, "getloadavg") else 0
    torch.set_num_threads(max(before, (os.cpu_count() or 1) - busy))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _run(build: Builder, start: list[Tensor], gradients: Gradients, dtype: torch.dtype) -> list[Tensor]:
    params = [p.to(dtype, copy=True).requires_grad_() for p in start]
    # Copies, because clipping works in place.
    grads = [g.to(dtype, copy=True) for g in gradients.live]
    attach(params, grads)
    step = Turn(build(params, _LR), gradients.backward(params, grads))
    for k in range(_STEPS):
        if step.evaluations > 1 and k == _CYCLES:
            break
        gradients.refresh(k)
        torch._foreach_copy_(grads, gradients.live)
        step()
    return [p.detach() for p in params]


def _compare(
    contestant: Contestant, tensors: TensorList, found: list[Tensor], right: list[Tensor], start: list[Tensor]
) -> None:
    for i, (a, b, begin) in enumerate(zip(found, right, start, strict=True)):
        moved = (b - begin.double()).abs().max().item()
        allowed = contestant.relative * moved + _ROUNDING * b.abs().max().item()
        error = (a.double() - b).abs().max().item()
        if not error <= allowed:  # written so that NaN fails
            raise GateError(
                f"{contestant.name} on {tensors.name}: tensor {i} is {error:.2g} away from the float64 reference "
                f"after a few steps or cycles, rounding explains {allowed:.2g}; nothing is reported"
            )
