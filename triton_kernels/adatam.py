"""AdaTAM and AdaTAMW: TAM's damped momentum as the first moment of Adam (arXiv 2412.18790).

    s, s^ as in tam.py, from m and the raw gradient
    m = beta1 m + (eps_damping + (1 + s^) / 2) (g + weight_decay theta)      heavy ball: no (1 - beta1)
    v = beta2 v + (1 - beta2) g^2                                            raw, undamped
    theta -= lr m / (sqrt(v / (1 - beta2^t)) + eps)                          the correction only with bias_correction
    AdaTAMW: theta *= 1 - lr weight_decay first, and m takes g alone

float32 bytes per element: reduce reads g, m (8); update reads theta, g, m, v and writes theta, m, v (28). bfloat16: 6
and 22. The twin of ``csrc/rules/adatam.h``, operation by operation: square root and division are rounded to nearest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl
from torch import Tensor

from . import engine
from .adam import power, quotient
from .engine import Rule, advance, decide, open_piece, rates
from .philox import noise_of_blocks, noise_of_elements
from .storage import nearest, stochastic
from .table import (
    GRAD,
    PARAM,
    ROW_GROUP,
    ROW_KEY,
    ROW_SCOPE,
    ROW_SLOT,
    ROW_WIDTH,
    SECOND_STATE,
    SEED,
    STATE,
)

if TYPE_CHECKING:
    from torsion.ops._frame import Step

# Columns of `hyper` after the common ones, and of the coefficients.
BETA1 = tl.constexpr(6)
BETA2 = tl.constexpr(7)
EPS = tl.constexpr(8)
DECAY = tl.constexpr(9)
EPS_DAMPING = tl.constexpr(10)
BIAS_CORRECTION = tl.constexpr(11)
HYPER = tl.constexpr(12)
COEFFICIENTS = tl.constexpr(10)


@triton.jit
def set_coefficients(out, hyper, k, taken, damping, clip):
    """Of a tile of tensors: ``taken`` steps before this one, ``damping`` (1 + s^) / 2 as it is stored."""
    lr, coupled, shrink = rates(hyper, k)
    damping = tl.load(hyper + EPS_DAMPING, mask=k, other=0) + damping.to(tl.float64)
    beta2 = tl.load(hyper + BETA2, mask=k, other=0)
    corrects = tl.load(hyper + BIAS_CORRECTION, mask=k, other=0) != 0
    tl.store(out, tl.load(hyper + BETA1, mask=k, other=0), mask=k)
    tl.store(out + 1, damping, mask=k)
    tl.store(out + 2, clip + tl.zeros_like(lr), mask=k)
    tl.store(out + 3, coupled, mask=k)
    tl.store(out + 4, beta2, mask=k)
    tl.store(out + 5, 1 - beta2, mask=k)
    tl.store(out + 6, tl.where(corrects, 1 / tl.sqrt(1 - power(beta2, taken + 1)), 1.0), mask=k)
    tl.store(out + 7, tl.load(hyper + EPS, mask=k, other=0), mask=k)
    tl.store(out + 8, lr, mask=k)
    tl.store(out + 9, shrink, mask=k)


@triton.jit(do_not_specialize=["n_rows", "n_scopes", "n_groups"])
def finalize_kernel(
    sums, rows, scope_group, numbers, shared, steps, status, found_inf, coefficients, n_rows, n_scopes, n_groups,
    H: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    skip, clip = decide(sums + n_scopes.to(tl.int64) * 3, numbers + n_groups * H, found_inf, status, 3, 1, True)
    if skip:
        return
    advance(sums, scope_group, numbers, shared, n_scopes, 3, H, DECAY, TILE)
    tl.debug_barrier()  # coefficients come from `shared` as it is stored, so that a resumed run gives the same
    for at in range(0, n_rows, TILE):
        row = (at + tl.arange(0, TILE)).to(tl.int64)
        k = row < n_rows
        record = rows + row * ROW_WIDTH
        hyper = numbers + tl.load(record + ROW_GROUP, mask=k, other=0) * H
        step = steps + tl.load(record + ROW_SLOT, mask=k, other=0)
        damping = tl.load(shared + tl.load(record + ROW_SCOPE, mask=k, other=0) * 3 + 2, mask=k, other=0)
        taken = tl.load(step, mask=k, other=0)
        tl.store(step, taken + 1, mask=k)
        set_coefficients(coefficients + row * COEFFICIENTS, hyper, k, taken, damping, clip)


@triton.jit
def read_coefficients(c, MATHS: tl.constexpr):
    return (
        tl.load(c).to(MATHS), tl.load(c + 1).to(MATHS), tl.load(c + 2).to(MATHS), tl.load(c + 3).to(MATHS),
        tl.load(c + 4).to(MATHS), tl.load(c + 5).to(MATHS), tl.load(c + 6).to(MATHS), tl.load(c + 7).to(MATHS),
        tl.load(c + 8).to(MATHS), tl.load(c + 9).to(MATHS),
    )  # fmt: skip


@triton.jit
def descend(theta, grad, m, v, c, MATHS: tl.constexpr):
    """The equations: new parameter and moments, all in the type of the maths."""
    beta1, damping, clip, coupled, beta2, one_minus_beta2, rsqrt_correction, eps, lr, shrink = c
    g = clip * grad
    m = beta1 * m + damping * (g + coupled * theta)
    v = beta2 * v + one_minus_beta2 * g * g
    return shrink * theta - lr * quotient(m, v, rsqrt_correction, eps, MATHS), m, v


@triton.jit
def update_kernel(
    rows, pieces, coefficients, numbers, steps, grad_scale, status,
    WORD: tl.constexpr, MATHS: tl.constexpr, STOCHASTIC: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(status + 2) != 0:
        return
    row, record, hyper, begin, whole, end, pre = open_piece(rows, pieces, numbers, grad_scale, H, BLOCK)
    pre = pre.to(MATHS)
    c = read_coefficients(coefficients + row * COEFFICIENTS, MATHS)
    if STOCHASTIC:
        slot = tl.load(record + ROW_SLOT)
        step = tl.load(steps + slot).to(tl.uint32)
        seed = tl.load(hyper + SEED).to(tl.int64)
        element = tl.load(record + ROW_KEY) + begin
    lane = tl.arange(0, BLOCK)
    params = tl.multiple_of(tl.load(record + PARAM).to(tl.pointer_type(WORD)), 16) + begin
    grads = tl.multiple_of(tl.load(record + GRAD).to(tl.pointer_type(WORD)), 16) + begin
    moments = tl.multiple_of(tl.load(record + STATE).to(tl.pointer_type(MATHS)), 16) + begin
    squares = tl.multiple_of(tl.load(record + SECOND_STATE).to(tl.pointer_type(MATHS)), 16) + begin
    for at in range(0, whole, BLOCK):
        i = at + lane
        grad = tl.load(grads + i).to(MATHS) * pre
        theta, m, v = descend(tl.load(params + i).to(MATHS), grad, tl.load(moments + i), tl.load(squares + i), c, MATHS)
        tl.store(moments + i, m)
        tl.store(squares + i, v)
        if STOCHASTIC:
            noise = noise_of_blocks(seed, element + at, step, slot.to(tl.uint32), BLOCK)
            tl.store(params + i, stochastic(theta, noise, WORD).to(WORD, bitcast=True))
        elif WORD == MATHS:
            tl.store(params + i, theta)
        else:
            tl.store(params + i, nearest(theta, WORD).to(WORD, bitcast=True))
    params = tl.load(record + PARAM).to(tl.pointer_type(WORD)) + begin
    grads = tl.load(record + GRAD).to(tl.pointer_type(WORD)) + begin
    moments = tl.load(record + STATE).to(tl.pointer_type(MATHS)) + begin
    squares = tl.load(record + SECOND_STATE).to(tl.pointer_type(MATHS)) + begin
    for at in range(whole, end, BLOCK):
        i = at + lane
        k = i < end
        grad = tl.load(grads + i, mask=k).to(MATHS) * pre
        theta, m, v = descend(
            tl.load(params + i, mask=k).to(MATHS), grad,
            tl.load(moments + i, mask=k), tl.load(squares + i, mask=k), c, MATHS,
        )  # fmt: skip
        tl.store(moments + i, m, mask=k)
        tl.store(squares + i, v, mask=k)
        if STOCHASTIC:
            noise = noise_of_elements(seed, element + i, step, slot.to(tl.uint32))
            tl.store(params + i, stochastic(theta, noise, WORD).to(WORD, bitcast=True), mask=k)
        elif WORD == MATHS:
            tl.store(params + i, theta, mask=k)
        else:
            tl.store(params + i, nearest(theta, WORD).to(WORD, bitcast=True), mask=k)


RULE = Rule(
    name="adatam",
    family="adatam",
    states=2,
    hyper=HYPER.value,
    shared=3,
    coefficients=COEFFICIENTS.value,
    sums=3,
    finalize=finalize_kernel,
    update=update_kernel,
)


def reduce(step: Step) -> Tensor:
    """Sums of the step's tensors, float64 ``[S + 1, 3]``: <m, g>, |g|^2, |m|^2 by scope, then over all tensors.

    Processes that share a step add these up.
    """
    return engine.reduce(RULE, step)


def apply_(step: Step, sums: Tensor) -> None:
    """The rest of the step from the sums over all processes: decides, advances the scopes, updates in place."""
    engine.apply_(RULE, step, sums)


def step_(step: Step) -> None:
    """A whole step, in place."""
    engine.step_(RULE, step)


def audit_cases() -> Iterator[dict[str, Any]]:
    """What to compile without a GPU; see :func:`torsion.triton_kernels.engine.audit_cases`."""
    return engine.audit_cases(RULE)
