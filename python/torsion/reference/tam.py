"""TAM in plain PyTorch: the executable specification."""

from __future__ import annotations

import torch
from torch import Tensor

from torsion.ops._frame import Step
from torsion.ops._rules import TAM
from torsion.reference import _torque


def tam_(step: Step, sums: Tensor | None = None) -> None:
    r"""One step of torque-aware momentum (Torque-Aware Momentum, arXiv 2412.18790), in place.

    With s^ the smoothed cosine of the scope (see :mod:`torsion.reference._torque`) and d = (1 + s^) / 2::

        m     = momentum m + (eps_damping + d) (g + weight_decay theta)
        theta = theta - lr m

    Decoupled decay shrinks theta by (1 - lr weight_decay) first and leaves it out of m. At its first step under
    ``init="clone"`` a tensor takes m = g + weight_decay theta undamped.

    Args:
        step: the tensors; see :class:`torsion.ops.Step` for shapes and dtypes.
        sums: float64 ``[S + 1, 3]`` where they come from elsewhere (an all-reduce); computed when None.
    """
    scalars = _torque.Scalars(TAM, step)
    if sums is None:
        sums = _torque.reduce(TAM, step)
    first = [scalars.first(i) for i in range(len(step.params))]
    skip, clip = _torque.advance(scalars, sums)
    _torque.count(step, skip)
    for i, (param, momentum) in enumerate(zip(step.params, step.states[0], strict=True)):
        h, dtype = scalars.hyper[step.groups[i]], momentum.dtype
        theta, grad = param.to(dtype), clip.to(dtype) * scalars.grad(i)
        decoupled = h["decoupled"] != 0
        coupled = torch.where(decoupled, torch.zeros_like(h["lr"]), h["weight_decay"]).to(dtype)
        shrink = torch.where(decoupled, 1 - h["lr"] * h["weight_decay"], torch.ones_like(h["lr"])).to(dtype)
        damping = h["eps_damping"] + (1 + step.shared[step.scopes[i], 0].double()) / 2
        damping = torch.where(first[i], torch.ones_like(damping), damping).to(dtype)
        beta = torch.where(first[i], torch.zeros_like(h["momentum"]), h["momentum"]).to(dtype)

        new = beta * momentum + damping * (grad + coupled * theta)
        _torque.write(scalars, i, param, shrink * theta - h["lr"].to(dtype) * new, skip)
        _torque.write(scalars, i, momentum, new, skip)


def tam_sums(step: Step) -> Tensor:
    """The sums :func:`tam_` starts from: float64 ``[S + 1, 3]``, the last row over every tensor."""
    return _torque.reduce(TAM, step)
