"""AdaTAM and AdaTAMW in plain PyTorch: the executable specification."""

from __future__ import annotations

import torch
from torch import Tensor

from torsion.ops._frame import Step
from torsion.ops._rules import ADATAM
from torsion.reference import _torque
from torsion.reference._step import Base, Pass, Site


def descend(at: Site, theta: Tensor, grad: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The equations of :func:`adatam_` on one tensor: its new (theta, m, v)."""
    h = at.numbers
    damping = h["eps_damping"] + (1 + at.shared[0]) / 2
    correction = torch.where(h["bias_correction"] != 0, (1 - h["beta2"] ** at.step).rsqrt(), 1.0)
    clip, damping, correction, eps, lr = at.cast(at.clip, damping, correction, h["eps"], h["lr"])
    beta1, beta2, one_minus_beta2 = at.cast(h["beta1"], h["beta2"], 1 - h["beta2"])
    coupled, shrink = at.cast(*at.decay())
    grad = clip * grad
    m = beta1 * m + damping * (grad + coupled * theta)
    v = beta2 * v + one_minus_beta2 * grad * grad
    return shrink * theta - lr * (m / (v.sqrt() * correction + eps)), m, v


BASE = Base(ADATAM, _torque.N_SUMS, _torque.GRAD_NORM2, _torque.reduce, descend, _torque.advance)


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
    tensors = Pass(step, ADATAM.hyper, BASE)
    sums = adatam_sums(step) if sums is None else sums
    tensors.decide(sums, BASE.grad_norm2)
    tensors.advance(sums)
    for i, (param, exp_avg, exp_avg_sq) in enumerate(zip(step.params, *step.states, strict=True)):
        theta, m, v = tensors.descend(i, param, tensors.grad(i))
        tensors.write(param, tensors.rounded(i, theta))
        tensors.write(exp_avg, m)
        tensors.write(exp_avg_sq, v)


def adatam_sums(step: Step) -> Tensor:
    """The sums :func:`adatam_` starts from: float64 ``[S + 1, 3]``, the last row over every tensor."""
    tensors = Pass(step, ADATAM.hyper, BASE)
    return tensors.add_up(tensors.base_sums, BASE.n_sums)
