"""torch.optim.SGD as the descent of a Lookbehind cycle: the executable specification.

::

    h     = g + weight_decay theta
    m     = momentum m + (1 - dampening) h      first step: m = h
    theta = theta - lr m                        nesterov: lr (h + momentum m); without momentum: lr h
"""

from __future__ import annotations

import torch
from torch import Tensor

from torsion.ops._rules import SGD, SGD_MOMENTUM
from torsion.reference._step import Base, Site


def reduce(grad: Tensor, *_states: Tensor) -> list[Tensor]:
    """|g|^2."""
    return [(grad * grad).sum()]


def descend(at: Site, theta: Tensor, grad: Tensor) -> tuple[Tensor]:
    """Without momentum: the new theta."""
    decay, lr = at.cast(at.numbers["weight_decay"], at.numbers["lr"])
    return (theta - lr * (grad + decay * theta),)


def descend_with_momentum(at: Site, theta: Tensor, grad: Tensor, m: Tensor) -> tuple[Tensor, Tensor]:
    """The new (theta, m)."""
    h, nesterov = at.numbers, at.numbers["nesterov"] != 0
    momentum = torch.where(at.first, 0.0, h["momentum"])
    fresh = torch.where(at.first, 1.0, 1 - h["dampening"])
    ahead = torch.where(nesterov, h["momentum"], 1.0)
    momentum, fresh, raw, ahead, decay, lr = at.cast(momentum, fresh, nesterov, ahead, h["weight_decay"], h["lr"])
    force = grad + decay * theta
    m = momentum * m + fresh * force
    return theta - lr * (raw * force + ahead * m), m


BASE = Base(SGD, 1, 0, reduce, descend)
MOMENTUM_BASE = Base(
    SGD_MOMENTUM, 1, 0, reduce, descend_with_momentum, clones=lambda h: torch.ones_like(h["lr"], dtype=torch.bool)
)
