"""How close is close enough: the only tolerances of the suite. A looser row says why, as a bound one can check.

``rtol`` is relative to each number, ``scale`` to the largest number of the tensor or of what the caller names (sums
of terms that cancel keep the error of their terms), ``atol`` absolute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Row:
    rtol: float
    scale: float = 0.0
    atol: float = 0.0
    why: str = ""


EXACT = Row(0.0, why="the same operations in the same order")

# Golden vectors: the figures that come with them, relative to each number.
GOLDEN = {
    torch.float64: Row(1e-13, why="the order of summation is free, and so are the last bits"),
    torch.float32: Row(5e-6, why="24 bits, a few dozen operations, and v starts at 1e-3 of its size"),
}

# State and maths against the float64 judge.
STATE = {
    torch.float64: Row(0.0, scale=1e-13, why="the order of summation is free, and so are the last bits"),
    torch.float32: Row(0.0, scale=5e-6, why="24 bits, errors of some ten steps add up"),
    torch.bfloat16: Row(0.0, scale=5e-6, why="state and maths are float32 whatever the parameter"),
    torch.float16: Row(0.0, scale=5e-6, why="state and maths are float32 whatever the parameter"),
}

# Parameters after one step from the same start, against the unrounded judge: the maths plus one rounding to storage.
STORED = {
    torch.float64: STATE[torch.float64],
    torch.float32: STATE[torch.float32],
    torch.bfloat16: Row(2.0**-8, scale=5e-6, why="8 bits: rounding to nearest moves a number by at most 2^-8 of it"),
    torch.float16: Row(
        2.0**-11, scale=5e-6, atol=2.0**-25, why="11 bits: at most 2^-11; below 2^-14 half a step of 2^-24"
    ),
}

# The same, rounded at random: to either neighbour.
STORED_STOCHASTIC = {
    torch.bfloat16: Row(2.0**-7, scale=5e-6, why="to either neighbour: a whole unit in the last of 8 bits"),
    torch.float16: Row(2.0**-10, scale=5e-6, atol=2.0**-24, why="to either neighbour, one of 11 bits or 2^-24"),
}

# Cosines, their running means and dampings: between -1 and 1, kept in the dtype of `shared`.
COSINE = {
    torch.float64: Row(0.0, atol=1e-13, why="the order of summation is free, and so are the last bits"),
    torch.float32: Row(0.0, atol=2e-6, why="stored in float32, and momentum of float32 went into it"),
}

# One step's sums in float64, from data that is the same to the last bit.
SUMS = Row(0.0, scale=1e-13, why="the order of summation is free; products of two float32 are exact in float64")

# Two runs in float64 whose sums were taken in another order: other chunks, other lists, another scale.
REORDERED = Row(0.0, scale=1e-11, why="1e-16 a step, divided by norms that may be 1e-3 of their terms")

# Normals of the compiled generator against float64 arithmetic on the same uniform numbers.
NORMALS = {
    torch.float64: Row(1e-15, atol=6e-15, why="the judge rounds its angle 2 pi u by up to 9e-16, times r below 6.7"),
    torch.float32: Row(
        2.0**-21, why="2^-21.7 seen in 6e7 pairs: errors of radius, angle, its sine and products add up"
    ),
    torch.bfloat16: Row(2.0**-7, why="one of 8 bits, where float32 lies on either side of a tie"),
    torch.float16: Row(2.0**-10, atol=2.0**-24, why="one of 11 bits, where float32 lies on either side of a tie"),
}

NORM = Row(1e-6, why="gradients in float32 before and after division by a scale that is no power of two")


def close(actual: Tensor, expected: Tensor | float, row: Row, what: str = "", largest: float = 0.0) -> None:
    """Assert that ``actual`` is within ``row`` of ``expected``, element by element; NaN is close to nothing."""
    a, b = actual.detach().cpu().double(), torch.as_tensor(expected, dtype=torch.float64).detach().cpu()
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} against {tuple(b.shape)}"
    if not b.numel():
        return
    bound = row.rtol * b.abs() + row.scale * max(float(b.abs().max()), largest) + row.atol
    off = (a - b).abs()
    good = (a == b) | (off <= bound)  # infinities of one sign are equal, NaN is not
    if not good.all():
        worst = torch.where(good, -torch.ones_like(off), off.nan_to_num(nan=torch.inf) - bound).argmax()
        raise AssertionError(
            f"{what}: {(~good).sum()} of {b.numel()} off; worst at {int(worst)}: {a.flatten()[worst].item()!r}, "
            f"expected {b.flatten()[worst].item()!r}, may differ by {bound.flatten()[worst].item():.3g} ({row.why})"
        )
