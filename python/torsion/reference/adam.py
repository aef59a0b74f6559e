"""torch.optim.Adam and AdamW (no amsgrad) as the descent of a Lookbehind cycle: the executable specification.

::

    h     = g + weight_decay theta            AdamW: h = g, and theta *= 1 - lr weight_decay first
    m     = beta1 m + (1 - beta1) h
    v     = beta2 v + (1 - beta2) h^2
    theta = theta - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)
"""

from __future__ import annotations

from torch import Tensor

from torsion.ops._rules import ADAM
from torsion.reference._step import Base, Site
from torsion.reference.sgd import reduce


def descend(at: Site, theta: Tensor, grad: Tensor, m: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The new (theta, m, v)."""
    h = at.numbers
    step_size, correction = h["lr"] / (1 - h["beta1"] ** at.step), (1 - h["beta2"] ** at.step).rsqrt()
    step_size, correction, eps = at.cast(step_size, correction, h["eps"])
    beta1, one_minus_beta1, beta2, one_minus_beta2 = at.cast(h["beta1"], 1 - h["beta1"], h["beta2"], 1 - h["beta2"])
    coupled, shrink = at.cast(*at.decay())
    force = grad + coupled * theta
    m = beta1 * m + one_minus_beta1 * force
    v = beta2 * v + one_minus_beta2 * force * force
    return shrink * theta - step_size * (m / (v.sqrt() * correction + eps)), m, v


BASE = Base(ADAM, 1, 0, reduce, descend)
