"""TAM in plain PyTorch: the executable specification."""

from __future__ import annotations

import torch
from torch import Tensor

from torsion.ops._frame import Step
from torsion.ops._rules import TAM
from torsion.reference import _torque
from torsion.reference._step import Base, Pass, Site


def descend(at: Site, theta: Tensor, grad: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """The equations of :func:`tam_` on one tensor: its new (theta, m)."""
    h = at.numbers
    damping = torch.where(at.first, 1.0, h["eps_damping"] + (1 + at.shared[0]) / 2)
    momentum = torch.where(at.first, 0.0, h["momentum"])
    clip, momentum, damping, lr = at.cast(at.clip, momentum, damping, h["lr"])
    coupled, shrink = at.cast(*at.decay())
    m = momentum * m + damping * (clip * grad + coupled * theta)
    return shrink * theta - lr * m, m


BASE = Base(
    TAM, _torque.N_SUMS, _torque.GRAD_NORM2, _torque.reduce, descend, _torque.advance, lambda h: h["clone"] != 0
)


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
    tensors = Pass(step, TAM.hyper, BASE)
    sums = tam_sums(step) if sums is None else sums
    tensors.decide(sums, BASE.grad_norm2)
    tensors.advance(sums)
    for i, (param, momentum) in enumerate(zip(step.params, step.states[0], strict=True)):
        theta, m = tensors.descend(i, param, tensors.grad(i))
        tensors.write(param, tensors.rounded(i, theta))
        tensors.write(momentum, m)


def tam_sums(step: Step) -> Tensor:
    """The sums :func:`tam_` starts from: float64 ``[S + 1, 3]``, the last row over every tensor."""
    tensors = Pass(step, TAM.hyper, BASE)
    return tensors.add_up(tensors.base_sums, BASE.n_sums)
