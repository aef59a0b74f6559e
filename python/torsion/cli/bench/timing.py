"""Clocks, interleaved rounds, and what may be said of them."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

__all__ = ["DISTURBED", "Percentiles", "Rounds", "Sampler", "Turn", "clock_of", "interleave", "stopwatch"]

DISTURBED = 1.5
"""A round is dropped when its baseline took longer than this many times the baseline's own median."""

_SAMPLE_SECONDS = 5e-3
"""Shorter steps are repeated up to this, so that the clock's own cost and its grain do not show."""

Sampler = Callable[[], float]
"""Runs a contestant and returns its seconds per step."""


def clock_of(threads: int) -> tuple[str, Callable[[], float]]:
    """Name and reading of the clock for a number of CPU threads.

    One thread is judged by the processor time it used: another process then costs it nothing but its cache. Of several
    threads the user waits for the last one, which only wall time shows.
    """
    return ("process CPU time", time.process_time) if threads == 1 else ("wall time", time.perf_counter)


class Turn:
    """A contestant's step as it is taken and timed: the gradients a cycle asks for are made off its clock, and counted.

    Args:
        step: a step, or a cycle: it then returns an iterator that yields wherever it needs gradients anew.
        evaluate: makes the gradients at the parameters as they stand.
        clock: seconds; see :func:`clock_of`.

    Attributes:
        evaluations: gradients that the last step asked for; 0 where it just used those it found.
    """

    def __init__(
        self,
        step: Callable[[], object],
        evaluate: Callable[[], object],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._step, self._evaluate, self._clock = step, evaluate, clock
        self._off = 0.0
        self.evaluations = 0

    def __call__(self) -> None:
        """Take the step."""
        self.evaluations = 0
        taken = self._step()
        if isinstance(taken, Iterator):
            for _ in taken:
                begin = self._clock()
                self._evaluate()
                self._off += self._clock() - begin
                self.evaluations += 1

    def clock(self) -> float:
        """The clock's reading, less all time spent on gradients."""
        return self._clock() - self._off


def stopwatch(
    step: Callable[[], object], clock: Callable[[], float], prepare: Callable[[], None] | None = None
) -> Sampler:
    """Warm a step up and return what times it, repeating short ones.

    Args:
        step: what is timed.
        clock: seconds; see :func:`clock_of`.
        prepare: runs before every single step, off the clock; a step that has one is never repeated.
    """
    took = math.inf
    for _ in range(3):
        if prepare is not None:
            prepare()
        begin = clock()
        step()
        took = min(took, clock() - begin)
    repeats = 1 if prepare is not None else max(1, min(50, math.ceil(_SAMPLE_SECONDS / max(took, 1e-6))))

    def sample() -> float:
        if prepare is not None:
            prepare()
        begin = clock()
        for _ in range(repeats):
            step()
        return (clock() - begin) / repeats

    return sample


@dataclass(frozen=True)
class Percentiles:
    """Median of a sample and the span that holds its middle three fifths."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Percentiles:
        """Percentiles with linear interpolation between neighbours."""
        ordered = sorted(values)

        def at(fraction: float) -> float:
            place = fraction * (len(ordered) - 1)
            low = math.floor(place)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (place - low) * (ordered[high] - ordered[low])

        return cls(at(0.2), statistics.median(ordered), at(0.8))


@dataclass(frozen=True)
class Rounds:
    """Seconds per step of every contestant in the rounds that were kept.

    Attributes:
        seconds: contestant -> one number per kept round.
        baseline: the fastest of the baselines, by median.
        dropped: rounds in which the baseline was disturbed; see :data:`DISTURBED`.
    """

    seconds: Mapping[str, Sequence[float]]
    baseline: str
    dropped: int

    @property
    def kept(self) -> int:
        """Rounds that count."""
        return len(self.seconds[self.baseline])

    def of(self, name: str) -> Percentiles:
        """Seconds per step."""
        return Percentiles.of(self.seconds[name])

    def ratio(self, name: str) -> Percentiles:
        """Contestant over baseline, round by round."""
        return Percentiles.of(a / b for a, b in zip(self.seconds[name], self.seconds[self.baseline], strict=True))


def _settle(seconds: Mapping[str, list[float]], baselines: Sequence[str]) -> Rounds:
    medians = {name: statistics.median(seconds[name]) for name in baselines}
    baseline = min(medians, key=medians.__getitem__)
    kept = [r for r, took in enumerate(seconds[baseline]) if took <= DISTURBED * medians[baseline]]
    return Rounds(
        {name: [series[r] for r in kept] for name, series in seconds.items()},
        baseline,
        len(seconds[baseline]) - len(kept),
    )


def interleave(
    samplers: Mapping[str, Sampler],
    baselines: Sequence[str],
    rounds: int,
    refresh: Callable[[int], None],
    budget: float = math.inf,
) -> Rounds:
    """Let the contestants take turns until ``rounds`` rounds count.

    Everyone runs once a round, in an order drawn anew for each, so that nobody always inherits the same neighbour's
    cache. Rounds with a disturbed baseline are replaced, at most as many as were asked for.

    Args:
        samplers: contestant -> its sampler, warm.
        baselines: those the others are measured against; the fastest is taken.
        rounds: rounds wanted.
        refresh: called with the round's number before it, off the clock.
        budget: seconds after which no new round begins.
    """
    seconds: dict[str, list[float]] = {name: [] for name in samplers}
    order, draw, begin = list(samplers), random.Random(0), time.perf_counter()
    for r in range(2 * rounds):
        refresh(r)
        draw.shuffle(order)
        for name in order:
            seconds[name].append(samplers[name]())
        late = time.perf_counter() - begin > budget
        if late or (r + 1 >= rounds and _settle(seconds, baselines).kept >= rounds):
            break
    return _settle(seconds, baselines)
