"""Adam and AdamW as torch.optim takes them (no amsgrad): the base of a Lookbehind cycle.

    h = g + weight_decay theta            AdamW: h = g, and theta *= 1 - lr weight_decay first
    m = beta1 m + (1 - beta1) h
    v = beta2 v + (1 - beta2) h^2
    theta -= lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

Elements and coefficients only; ``lookbehind.py`` holds the kernels. The twin of ``csrc/rules/adam.h``, operation by
operation: square root and division are rounded to nearest.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .engine import rates

# Columns of `hyper` after the common ones.
BETA1 = tl.constexpr(6)
BETA2 = tl.constexpr(7)
EPS = tl.constexpr(8)
COEFFICIENTS = tl.constexpr(9)


@triton.jit
def power(base, exponent):
    """``base`` (float64, not negative) to a power of at least 1; exact for 1, where bias correction is largest."""
    found = tl.exp(exponent.to(tl.float64) * tl.log(tl.where(base > 0, base, 1.0)))
    return tl.where(exponent == 1, base, tl.where(base > 0, found, 0.0))


@triton.jit
def quotient(m, v, rsqrt_correction, eps, MATHS: tl.constexpr):
    """Adam's step, m / (sqrt(v) rsqrt_correction + eps)."""
    # Plain sqrt and / are approximate in float32.
    if MATHS == tl.float64:
        ratio = m / (tl.sqrt(v) * rsqrt_correction + eps)
    else:
        ratio = tl.div_rn(m, tl.sqrt_rn(v) * rsqrt_correction + eps)
    return ratio


@triton.jit
def set_coefficients(out, hyper, k, taken):
    """Of a tile of tensors: ``taken`` steps before this one."""
    lr, coupled, shrink = rates(hyper, k)
    beta1 = tl.load(hyper + BETA1, mask=k, other=0)
    beta2 = tl.load(hyper + BETA2, mask=k, other=0)
    tl.store(out, beta1, mask=k)
    tl.store(out + 1, 1 - beta1, mask=k)
    tl.store(out + 2, beta2, mask=k)
    tl.store(out + 3, 1 - beta2, mask=k)
    tl.store(out + 4, lr / (1 - power(beta1, taken + 1)), mask=k)
    tl.store(out + 5, 1 / tl.sqrt(1 - power(beta2, taken + 1)), mask=k)
    tl.store(out + 6, tl.load(hyper + EPS, mask=k, other=0), mask=k)
    tl.store(out + 7, coupled, mask=k)
    tl.store(out + 8, shrink, mask=k)


@triton.jit
def read_coefficients(c, MATHS: tl.constexpr):
    return (
        tl.load(c).to(MATHS), tl.load(c + 1).to(MATHS), tl.load(c + 2).to(MATHS),
        tl.load(c + 3).to(MATHS), tl.load(c + 4).to(MATHS), tl.load(c + 5).to(MATHS),
        tl.load(c + 6).to(MATHS), tl.load(c + 7).to(MATHS), tl.load(c + 8).to(MATHS),
    )  # fmt: skip


@triton.jit
def descend(theta, grad, m, v, c, MATHS: tl.constexpr):
    """The equations: new parameter and moments, all in the type of the maths."""
    beta1, one_minus_beta1, beta2, one_minus_beta2, step_size, rsqrt_correction, eps, coupled, shrink = c
    force = grad + coupled * theta
    m = beta1 * m + one_minus_beta1 * force
    v = beta2 * v + one_minus_beta2 * force * force
    return shrink * theta - step_size * quotient(m, v, rsqrt_correction, eps, MATHS), m, v
