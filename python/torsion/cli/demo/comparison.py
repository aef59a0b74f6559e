"""What the runs say together: mean and spread per arm, and whether two arms differ by more than their noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torsion.cli.demo.rates import spread
from torsion.cli.demo.tasks import Metric
from torsion.cli.demo.training import Run

__all__ = ["Difference", "Summary", "seed_noise", "smoothed", "summarize"]

# Two-sided 95 % points of Student's t for 1, 2, ... degrees of freedom; beyond them the normal value is close enough.
_T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)


@dataclass(frozen=True)
class Summary:
    """Mean over seeds, and their standard deviation (nan for a single seed)."""

    mean: float
    deviation: float
    count: int

    def show(self, digits: int) -> str:
        """Mean and spread, as `99.11 ± 0.21`."""
        if not self.count:
            return "-"
        spread_shown = "" if math.isnan(self.deviation) else f" ± {self.deviation:.{digits}f}"
        return f"{self.mean:.{digits}f}{spread_shown}"


def summarize(values: Sequence[float]) -> Summary:
    """Summary of one value per seed; a diverged run (nan) makes the mean nan, which is what happened."""
    if not values:
        return Summary(math.nan, math.nan, 0)
    several = len(values) > 1 and all(map(math.isfinite, values))  # stdev raises on anything else
    deviation = statistics.stdev(values) if several else math.nan
    return Summary(statistics.fmean(values), deviation, len(values))


@dataclass(frozen=True)
class Difference:
    """How one arm did against another in a metric, seed by seed, over the seeds that both finished."""

    baseline: Sequence[Run]
    other: Sequence[Run]
    metric: Metric

    @property
    def names(self) -> str:
        """What is subtracted from what."""
        return f"{self.other[0].plan.arm.name} - {self.baseline[0].plan.arm.name}"

    @property
    def values(self) -> list[float]:
        """One difference per seed."""
        key = self.metric.key
        of_seed = {run.plan.seed: run.final(key) for run in self.baseline if run.finished}
        return [
            run.final(key) - of_seed[run.plan.seed] for run in self.other if run.finished and run.plan.seed in of_seed
        ]

    @property
    def mean(self) -> float:
        """Mean over the seeds; nan without any."""
        return statistics.fmean(self.values) if self.values else math.nan

    @property
    def margin(self) -> float:
        """Half of the 95 % interval of the mean; nan for less than two seeds."""
        count = len(self.values)
        if count < 2 or not math.isfinite(self.mean):
            return math.nan
        return _T95[min(count - 2, len(_T95) - 1)] * statistics.stdev(self.values) / math.sqrt(count)

    @property
    def verdict(self) -> str:
        """What can be said of it, in a word or two."""
        if not self.values:
            return "not finished"
        if not math.isfinite(self.mean):
            return "diverged"
        if len(self.values) == 1:
            return "one seed"
        if abs(self.mean) <= self.margin:
            return "within noise"
        return "better" if (self.mean > 0) == self.metric.higher_is_better else "worse"

    def cell(self) -> str:
        """Mean, margin and verdict, as `+1.20 ± 0.40 better`; `noise` where the interval contains zero."""
        digits, verdict = self.metric.digits, self.verdict
        if verdict in ("not finished", "diverged"):
            return verdict
        margin = "" if math.isnan(self.margin) else f" ± {self.margin:.{digits}f}"
        return f"{self.mean:+.{digits}f}{margin} {verdict.removeprefix('within ')}"

    def sentence(self) -> str:
        """All of it in one sentence."""
        verdict = self.verdict
        if verdict == "not finished":
            return f"{self.names}: no seed was finished by both."
        unit = "points" if self.metric.unit == "%" else self.metric.unit  # of percentages no percentage
        said = f"{self.names}: {self.metric.label} {self.mean:+.{self.metric.digits}f} {unit}"
        if verdict == "diverged":
            return f"{said}, because a run diverged."
        if verdict == "one seed":
            return f"{said}, one seed. {seed_noise([self.baseline[0], self.other[0]], self.metric)}"
        interval = f"95 % interval over {len(self.values)} paired seeds ±{self.margin:.{self.metric.digits}f}"
        by_how_much = "" if verdict == "within noise" else " by more than the noise over seeds"
        return f"{said} ({interval}): {verdict}{by_how_much}."


def seed_noise(runs: Sequence[Run], metric: Metric) -> str:
    """What is known of the noise where no run has a second seed: the recorded grid has several at the same point."""
    known = [spread(run.plan.task.name, run.plan.arm.name, metric.key) for run in runs]
    recorded = [value for value in known if value is not None]
    if not recorded:
        return "Seeds differ too; compare several with --seed before believing it."
    return f"Seeds alone differ by about {max(recorded):.{metric.digits}f} (standard deviation in the recorded grid)."


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean over a centred window, cut off at both ends, so that the curve has no lag and loses no step."""
    half, sums = window // 2, [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    result = []
    for index in range(len(values)):
        first, end = max(0, index - half), min(len(values), index + half + 1)
        result.append((sums[end] - sums[first]) / (end - first))
    return result
