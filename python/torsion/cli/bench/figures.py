"""A measured number and the conditions it holds under."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from torsion.cli.bench.comparisons import Limit

__all__ = ["QUOTABLE", "Figure", "Place"]

QUOTABLE = 20
"""Fewer rounds than this make a figure to look at, not to quote."""


@dataclass(frozen=True)
class Place:
    """Where and how long to measure."""

    device: torch.device
    threads: int
    rounds: int


@dataclass(frozen=True)
class Figure:
    """One figure.

    Attributes:
        what: whose figure it is.
        list: the tensors, by name; an empty string where they do not matter.
        unit: of ``value``: "x" (times the baseline), "bytes", "s", "%", "launches", "gradients" or
            "points".
        value: the median over the rounds; None where it could not be measured, ``note`` says why.
        against: the baseline of a ratio.
        p20, p80: the span of the middle three fifths of the rounds.
        seconds, baseline_seconds: medians per step behind a ratio.
        bytes_per_element: that the method cannot do without in a step or cycle.
        evaluations: gradients of a cycle, counted; None for a step, which takes the one it finds.
        gigabytes_per_second: by those bytes.
        copy_percent: the same as a share of a copy's in the same rounds.
        seeds: of whole training runs, which are not repeated.
        rounds, dropped: rounds that count, and those with a disturbed baseline.
        limit: what is asked of ``value``: at most this, or ``at_least``.
    """

    what: str
    list: str
    threads: int
    device: str
    unit: str
    value: float | None = None
    against: str = ""
    clock: str = ""
    dtype: str = "float32"
    p20: float | None = None
    p80: float | None = None
    seconds: float | None = None
    baseline_seconds: float | None = None
    bytes_per_element: int | None = None
    evaluations: int | None = None
    gigabytes_per_second: float | None = None
    copy_percent: float | None = None
    rounds: int = 0
    seeds: int = 0
    dropped: int = 0
    limit: float | None = None
    at_least: bool = False
    note: str = ""

    @classmethod
    def at(cls, place: Place, what: str, tensors: str, unit: str, limit: Limit | None = None, **numbers: Any) -> Figure:
        """A figure measured at ``place``."""
        asked: dict[str, Any] = {} if limit is None else {"limit": limit.value, "at_least": limit.at_least}
        return cls(what, tensors, place.threads, place.device.type, unit, **asked, **numbers)

    @property
    def passed(self) -> bool | None:
        """Whether the limit is kept; None without one, or without a value."""
        if self.limit is None or self.value is None:
            return None
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    @property
    def quotable(self) -> bool:
        """Whether enough rounds stand behind it; figures that are no medians over rounds always are."""
        return self.unit != "x" or self.rounds >= QUOTABLE or self.seeds > 0

    def as_dict(self) -> dict[str, Any]:
        """For a record."""
        return {**asdict(self), "passed": self.passed, "quotable": self.quotable}
