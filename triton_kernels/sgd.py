"""SGD as torch.optim.SGD takes it: the base of a Lookbehind cycle.

    h = g + weight_decay theta
    m = momentum m + (1 - dampening) h      first step: m = h
    theta -= lr m                           nesterov: lr (h + momentum m); without momentum: lr h

Elements and coefficients only; ``lookbehind.py`` holds the kernels. The twin of ``csrc/rules/sgd.h``, operation by
operation.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .table import LR, WEIGHT_DECAY

# Columns of `hyper` after the common ones.
MOMENTUM = tl.constexpr(6)
DAMPENING = tl.constexpr(7)
NESTEROV = tl.constexpr(8)
COEFFICIENTS = tl.constexpr(2)
MOMENTUM_COEFFICIENTS = tl.constexpr(6)


@triton.jit
def set_coefficients(out, hyper, k):
    """Of a tile of tensors, without momentum."""
    tl.store(out, tl.load(hyper + WEIGHT_DECAY, mask=k, other=0), mask=k)
    tl.store(out + 1, tl.load(hyper + LR, mask=k, other=0), mask=k)


@triton.jit
def read_coefficients(c, MATHS: tl.constexpr):
    return tl.load(c).to(MATHS), tl.load(c + 1).to(MATHS)


@triton.jit
def descend(theta, grad, c):
    """The equations without momentum: the new parameter, all in the type of the maths."""
    coupled, lr = c
    return theta - lr * (grad + coupled * theta)


@triton.jit
def set_momentum_coefficients(out, hyper, k, taken):
    """Of a tile of tensors: ``taken`` steps before this one."""
    first = taken == 0
    momentum = tl.load(hyper + MOMENTUM, mask=k, other=0)
    nesterov = tl.load(hyper + NESTEROV, mask=k, other=0) != 0
    tl.store(out, tl.where(first, 0.0, momentum), mask=k)
    tl.store(out + 1, tl.where(first, 1.0, 1 - tl.load(hyper + DAMPENING, mask=k, other=0)), mask=k)
    tl.store(out + 2, tl.load(hyper + WEIGHT_DECAY, mask=k, other=0), mask=k)
    tl.store(out + 3, tl.where(nesterov, 1.0, 0.0), mask=k)
    tl.store(out + 4, tl.where(nesterov, momentum, 1.0), mask=k)
    tl.store(out + 5, tl.load(hyper + LR, mask=k, other=0), mask=k)


@triton.jit
def read_momentum_coefficients(c, MATHS: tl.constexpr):
    return (
        tl.load(c).to(MATHS), tl.load(c + 1).to(MATHS), tl.load(c + 2).to(MATHS),
        tl.load(c + 3).to(MATHS), tl.load(c + 4).to(MATHS), tl.load(c + 5).to(MATHS),
    )  # fmt: skip


@triton.jit
def descend_with_momentum(theta, grad, m, c):
    """The equations: new parameter and momentum, all in the type of the maths."""
    momentum, fresh, coupled, raw, ahead, lr = c
    force = grad + coupled * theta
    m = momentum * m + fresh * force
    return theta - lr * (raw * force + ahead * m), m
