"""AdaTAM and AdaTAMW in plain PyTorch: the executable specification."""

from __future__ import annotations

import torch
from torch import Tensor

from torsion.ops._frame import Step
from torsion.ops._rules import ADATAM
from torsion.reference import _torque


def adatam_(step: Step, sums: Tensor | None = None) -> None:
    r"""One step of AdaTAM or AdaTAMW (Torque-Aware Momentum, arXiv 2412.18790), in place.

    With s^ the smoothed cosine of the scope (see :mod:`torsion.reference._torque`) and d = (1 + s^) / 2::

        m     = beta1 m + (eps_damping + d) (g + weight_decay theta)      no (1 - beta1): not an average
        v     = beta2 v + (1 - beta2) g^2
        theta = theta - lr m / (sqrt(v) + eps)

    ``bias_correction`` divides v by 1 - beta2^t, t the tensor's own steps. Decoupled decay (AdaTAMW) shrinks theta by
    (1 - lr weight_decay) first and leaves it out of m.

    Args:
        step: the tensors; see :class:`torsion.ops.Step` for shapes and dtypes.
        sums: float64 ``[S + 1, 3]`` where they come from elsewhere (an all-reduce); computed when None.
    """
    scalars = _torque.Scalars(ADATAM, step)
    if sums is None:
        sums = _torque.reduce(ADATAM, step)
    skip, clip = _torque.advance(scalars, sums)
    _torque.count(step, skip)
    for i, (param, exp_avg, exp_avg_sq) in enumerate(zip(step.params, *step.states, strict=True)):
        h, dtype = scalars.hyper[step.groups[i]], exp_avg.dtype
        theta, grad = param.to(dtype), clip.to(dtype) * scalars.grad(i)
        decoupled = h["decoupled"] != 0
        coupled = torch.where(decoupled, torch.zeros_like(h["lr"]), h["weight_decay"]).to(dtype)
        shrink = torch.where(decoupled, 1 - h["lr"] * h["weight_decay"], torch.ones_like(h["lr"])).to(dtype)
        damping = (h["eps_damping"] + (1 + step.shared[step.scopes[i], 0].double()) / 2).to(dtype)
        t = step.steps[step.slots[i]].double()
        correction = torch.where(h["bias_correction"] != 0, (1 - h["beta2"] ** t).rsqrt(), torch.ones_like(t)).to(dtype)

        m = h["beta1"].to(dtype) * exp_avg + damping * (grad + coupled * theta)
        v = h["beta2"].to(dtype) * exp_avg_sq + (1 - h["beta2"]).to(dtype) * grad * grad
        move = m / (v.sqrt() * correction + h["eps"].to(dtype))
        _torque.write(scalars, i, param, shrink * theta - h["lr"].to(dtype) * move, skip)
        _torque.write(scalars, i, exp_avg, m, skip)
        _torque.write(scalars, i, exp_avg_sq, v, skip)


def adatam_sums(step: Step) -> Tensor:
    """The sums :func:`adatam_` starts from: float64 ``[S + 1, 3]``, the last row over every tensor."""
    return _torque.reduce(ADATAM, step)
