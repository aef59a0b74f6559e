"""The gate: nobody's speed is reported before it has computed the right thing on the very tensors it is timed on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from torsion.cli.bench.contestants import Builder, Contestant
from torsion.cli.bench.lists import TensorList
from torsion.cli.bench.problem import Gradients, attach, initial

__all__ = ["GateError", "check"]

_STEPS = 3  # momentum starts at the first, the cosine at the second, its memory at the third
_LR = 0.1  # large against the timed rate: parameters then move by much more than their last digit

RELATIVE = 2e-5
"""Of the largest movement in a tensor: float32 arithmetic, and torch's float32 sums of up to 5e7 terms."""

_ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Of the largest parameter: each of three steps rounds it once."""


class GateError(Exception):
    """A contestant does not compute what it is named after; nothing it did may be reported."""


def check(contestants: Iterable[Contestant], tensors: TensorList, gradients: Gradients, device: torch.device) -> None:
    """Take three steps with each contestant and with its judge in float64, and compare every parameter.

    Raises:
        GateError: a parameter is further off than float32 explains; names contestant, list, tensor and error.
    """
    judged: dict[Builder, list[Tensor]] = {}
    for contestant in contestants:
        judge = contestant.judge
        if judge is None:
            continue
        if judge not in judged:
            judged[judge] = _run(judge, tensors, gradients, device, torch.float64)
        found = _run(contestant.build, tensors, gradients, device, torch.float32)
        _compare(contestant.name, tensors, found, judged[judge], initial(tensors, device))


def _run(
    build: Builder, tensors: TensorList, gradients: Gradients, device: torch.device, dtype: torch.dtype
) -> list[Tensor]:
    params = [p.detach().to(dtype).requires_grad_() for p in initial(tensors, device)]
    gradients.refresh(0)
    # Copies, because clipping works in place; made here so that one contestant sees them in one place throughout.
    grads = [g.to(dtype, copy=True) for g in gradients.live]
    attach(params, grads)
    step = build(params, _LR)
    for k in range(_STEPS):
        gradients.refresh(k)
        torch._foreach_copy_(grads, gradients.live)
        step()
    return [p.detach() for p in params]


def _compare(name: str, tensors: TensorList, found: list[Tensor], right: list[Tensor], start: list[Tensor]) -> None:
    for i, (a, b, begin) in enumerate(zip(found, right, start, strict=True)):
        moved = (b - begin.detach().double()).abs().max().item()
        allowed = RELATIVE * moved + _ROUNDING * b.abs().max().item()
        error = (a.double() - b).abs().max().item()
        if not error <= allowed:  # written so that NaN fails
            raise GateError(
                f"{name} on {tensors.name}: tensor {i} is {error:.2g} away from the float64 reference after {_STEPS} "
                f"steps, at most {allowed:.2g} is rounding; nothing is reported"
            )
