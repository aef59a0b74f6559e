"""The course of lasso and noise over training: s(t), with which both are multiplied."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from torsion.optim import _checks

NAMES = ("one_cycle", "constant")

_RISES_FOR = 3, 10  # of the span: 0.3, as integers so that no rounding moves the peak by a step
_START = 1 / 25
_END = _START / 1e4
MAX_STEPS = 2**32 - 1  # a step is one 32-bit word of the counter that the noise is drawn with


def schedule(name: str, total_steps: int) -> Callable[[int], float]:
    r"""The factor s(t) of lasso and noise at step t = 0, 1, ...

    "one_cycle", with b = floor(0.3 T) and f = 4e-6, T being ``total_steps``::

        t < b        s = 1 + (1/25 - 1)/2 (1 + cos(pi t/b))          rises from 0.04 to 1
        b <= t < T   s = f + (1 - f)/2 (1 + cos(pi (t-b)/(T-b)))     falls
        t >= T       s = f                                           held, not 0

    "constant" is 1 always.

    Args:
        name: "one_cycle" or "constant".
        total_steps: the span T, an integer >= 1.

    Returns:
        A function of t >= 0 that returns a float.

    Raises:
        ValueError: another name, ``total_steps`` < 1; from the function, t < 0.
        TypeError: ``total_steps`` is not an integer, ``name`` not a string.

    Source: arXiv 2403.07688 and the authors' code, whose cycle this is.
    """
    return Schedule(name, total_steps).at


@dataclass(frozen=True)
class Schedule:
    """s(t) for a step that the host knows, and for one that only the device knows."""

    name: str
    total_steps: int

    def __post_init__(self) -> None:
        """Check the arguments."""
        _checks.word("", "schedule", self.name, NAMES)
        integer("total_steps", self.total_steps, 1, MAX_STEPS)

    @property
    def peak(self) -> int:
        """The step b at which the one-cycle schedule is 1."""
        return self.total_steps * _RISES_FOR[0] // _RISES_FOR[1]

    def at(self, t: int) -> float:
        """s(t), as :func:`schedule` says."""
        if not t >= 0:
            raise ValueError(f"t={t!r}: must be >= 0, the number of steps taken before this one")
        if self.name == "constant":
            return 1.0
        if t >= self.total_steps:
            return _END
        if t < self.peak:
            return 1.0 + (_START - 1.0) / 2.0 * (1.0 + math.cos(math.pi * t / self.peak))
        return _END + (1.0 - _END) / 2.0 * (1.0 + math.cos(math.pi * (t - self.peak) / (self.total_steps - self.peak)))

    def on_device(self, t: Tensor) -> Tensor:
        """s(t) for a 0-dim integer tensor, a 0-dim float64 tensor beside it; equal to :meth:`at` but for rounding."""
        if self.name == "constant":
            return torch.ones((), dtype=torch.float64, device=t.device)
        b, span = self.peak, self.total_steps
        at = t.clamp(max=span).double()
        rising = 1.0 + (_START - 1.0) / 2.0 * (1.0 + torch.cos(at * math.pi / max(b, 1)))
        falling = _END + (1.0 - _END) / 2.0 * (1.0 + torch.cos((at - b) * math.pi / (span - b)))
        return torch.where(t >= span, _END, torch.where(t < b, rising, falling))


def integer(name: str, value: object, least: int, most: int | None = None, meaning: str = "") -> None:
    """Raise unless ``value`` is an integer from ``least`` to ``most``."""
    bounds = f">= {least}" if most is None else f"from {least} to {most}"
    remedy = f"must be an integer {bounds}" + (f", {meaning}" if meaning else "")
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: {remedy}")
    if value < least or (most is not None and value > most):
        raise ValueError(f"{name}={value!r}: {remedy}")
