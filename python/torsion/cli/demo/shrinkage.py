"""Networks that shrink while they train beside dense ones: the table, and what the shrinking gained in plain words."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from rich import box
from rich.table import Table

from torsion.cli.demo.arms import Arm
from torsion.cli.demo.comparison import summarize
from torsion.cli.demo.outcome import Outcome, backends_used, count
from torsion.cli.demo.training import Run

__all__ = ["first_and_last_ms", "gains", "ratio", "shrinkage_table"]

_TENTHS = 10
_NO_GAIN = 0.97  # of the dense time; what is above could as well be noise


def first_and_last_ms(run: Run) -> tuple[float, float]:
    """Median milliseconds of a training step over the first and the last tenth of the run."""
    times = run.training_ms
    tenth = math.ceil(len(times) / _TENTHS)
    return (statistics.median(times[:tenth]), statistics.median(times[-tenth:])) if times else (math.nan, math.nan)


def shrinkage_table(outcome: Outcome) -> Table:
    """One row per arm: what it reached, what is left of it, and how long it took."""
    environment, settings = outcome.environment, outcome.settings
    seeds = settings["seeds"]
    table = Table(
        title=f"{outcome.task.name}: {outcome.task.summary}\n{settings['steps']} steps, "
        f"{f'seed {seeds[0]}' if len(seeds) == 1 else f'seeds {seeds[0]} to {seeds[-1]}'}, {environment['device']}, "
        f"{count(environment['threads'], 'thread')}, torch {environment['torch']}, {backends_used(environment)}",
        caption="mean ± standard deviation over seeds; units of each layer, means; ms/step: medians of the\n"
        "first and the last tenth of the run; to finish: all steps with windows and cuts, but without\n"
        "evaluations; inference: one batch as in training",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,
    )
    columns = _columns(outcome)
    table.add_column("", no_wrap=True)
    for heading in columns:
        table.add_column(heading, justify="right")
    for arm in outcome.comparison.arms:
        runs = outcome.of(arm)
        table.add_row(arm.name, *(cell(arm, runs) if runs else "-" for cell in columns.values()))
    return table


_Cell = Callable[[Arm, list[Run]], str]


def _columns(outcome: Outcome) -> dict[str, _Cell]:
    """Heading -> what stands in an arm's row."""
    rates, strengths = outcome.settings["rates"], outcome.settings["strengths"]
    columns: dict[str, _Cell] = {
        "best\nrate": lambda arm, runs: f"{rates[arm.name]:g}",
        "best\nlasso": lambda arm, runs: f"{strengths[arm.name]:g}" if arm.name in strengths else "-",
    }
    metric = outcome.task.metrics[0]  # of the others the difference is said below the table
    columns[f"{metric.label},\n{metric.unit}"] = lambda arm, runs: summarize(
        [run.final(metric.key) for run in runs]
    ).show(metric.digits)
    columns["parameters\nat the end"] = lambda arm, runs: _parameters(runs)
    columns["units"] = lambda arm, runs: _units(runs)
    columns["ms/step,\nfirst > last"] = lambda arm, runs: " > ".join(
        _mean(times, 2) for times in zip(*map(first_and_last_ms, runs), strict=True)
    )
    columns["s to\nfinish"] = lambda arm, runs: _mean([run.seconds for run in runs], 1)
    columns["ms/\ninference"] = lambda arm, runs: _mean([run.median_ms("inference_ms") for run in runs], 2)
    return columns


def _mean(values: Sequence[float], digits: int) -> str:
    return f"{summarize(values).mean:.{digits}f}"


def _parameters(runs: Sequence[Run]) -> str:
    left = summarize([float(run.parameters_left) for run in runs])
    spread = "" if math.isnan(left.deviation) or not left.deviation else f" ± {left.deviation:,.0f}"
    return f"{left.mean:,.0f}{spread}"


def _units(runs: Sequence[Run]) -> str:
    known = [list(run.units.values()) for run in runs if run.units]
    return " ".join(f"{statistics.fmean(layer):.0f}" for layer in zip(*known, strict=True)) or "-"


def ratio(outcome: Outcome, measure: Callable[[Run], float]) -> float:
    """A measure of the last arm relative to that of the first, mean over the seeds that both finished; nan without."""
    first, last = outcome.comparison.arms[0], outcome.comparison.arms[-1]
    of_seed = {run.plan.seed: measure(run) for run in outcome.of(first) if run.finished}
    pairs = [(measure(run), of_seed.get(run.plan.seed)) for run in outcome.of(last) if run.finished]
    ratios = [value / base for value, base in pairs if base]
    return statistics.fmean(ratios) if ratios else math.nan


def gains(outcome: Outcome) -> list[str]:
    """What was gained and what was not, one sentence each."""
    name = outcome.comparison.arms[-1].name
    left = ratio(outcome, lambda run: run.parameters_left)
    if math.isnan(left):
        return [f"{name}: no seed was finished by both."]
    sentences = [
        f"{name}: {left:.1%} of the parameters left, {1 / left:.1f} times fewer. "
        f"Time beside dense: whole training {_times(ratio(outcome, lambda run: run.seconds))}, "
        f"the last steps {_times(ratio(outcome, lambda run: first_and_last_ms(run)[1]))}, "
        f"inference {_times(ratio(outcome, lambda run: run.median_ms('inference_ms')))}."
    ]
    runs = [run for run in outcome.of(outcome.comparison.arms[-1]) if run.finished]
    windows = [sum(run.window_ms) / 1e3 for run in runs]
    metric, key = outcome.task.metrics[0], outcome.task.metrics[0].key
    worst = (min if metric.higher_is_better else max)(
        point[key] for run in runs for point in run.evaluations[len(run.evaluations) // 5 :]
    )
    sentences.append(
        f"Windows and cuts took {statistics.fmean(windows):.1f} s of that. On the way {metric.label} was as bad as "
        f"{worst:.{metric.digits}f} {metric.unit}, with the lasso at its height."
    )
    idle = {run.plan.seed: sum(run.units.values()) - sum(run.live.values()) for run in _dense(outcome)}
    if any(idle.values()):
        sentences.append(f"Of the dense network's units {statistics.fmean(idle.values()):.0f} never act either.")
    return sentences


def _dense(outcome: Outcome) -> list[Run]:
    return [run for run in outcome.of(outcome.comparison.arms[0]) if run.units]


def _times(value: float) -> str:
    return f"{value:.2f} x{' (no gain)' if value > _NO_GAIN else ''}"
