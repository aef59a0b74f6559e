"""What the runs say together: mean and spread per arm, and whether two arms differ by more than their noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from torsion.cli.demo.rates import spread
from torsion.cli.demo.tasks import Metric
from torsion.cli.demo.training import Run

__all__ = ["Summary", "compare", "smoothed", "summarize"]

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


def compare(baseline: Sequence[Run], other: Sequence[Run], metric: Metric) -> str:
    """One sentence on how `other` did against `baseline`, over the seeds that both finished."""
    names = f"{other[0].plan.arm.name} - {baseline[0].plan.arm.name}"
    of_seed = {run.plan.seed: run.final(metric.key) for run in baseline if run.finished}
    pairs = [
        run.final(metric.key) - of_seed[run.plan.seed] for run in other if run.finished and run.plan.seed in of_seed
    ]
    if not pairs:
        return f"{names}: no seed was finished by both."
    mean = statistics.fmean(pairs)
    unit = "points" if metric.unit == "%" else metric.unit  # a difference of percentages is not a percentage
    said = f"{names}: {metric.label} {mean:+.{metric.digits}f} {unit}"
    if not math.isfinite(mean):
        return f"{said}, because a run diverged."
    if len(pairs) == 1:
        return f"{said}, one seed. {_one_seed(baseline[0], other[0], metric)}"
    margin = _T95[min(len(pairs) - 2, len(_T95) - 1)] * statistics.stdev(pairs) / math.sqrt(len(pairs))
    interval = f"95 % interval over {len(pairs)} paired seeds ±{margin:.{metric.digits}f}"
    if abs(mean) <= margin:
        return f"{said} ({interval}): within noise."
    better = (mean > 0) == metric.higher_is_better
    return f"{said} ({interval}): {'better' if better else 'worse'} by more than the noise over seeds."


def _one_seed(baseline: Run, other: Run, metric: Metric) -> str:
    # A single run has no spread of its own; the recorded grid has several seeds at the same rate.
    task = baseline.plan.task.name
    known = [spread(task, run.plan.arm.name, metric.key) for run in (baseline, other)]
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
