"""The figure of networks that shrink while they train: a row for each network, dense beside DemP."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from torsion.cli.demo.comparison import smoothed
from torsion.cli.demo.outcome import Outcome, backends_used, count
from torsion.cli.demo.panels import INK, Colours, draw_runs, label_ends, new_panel, note
from torsion.cli.demo.training import Run

__all__ = ["write_figure"]

_COLOURS = ("#5a5a5a", "#D55E00")
_LEFT, _TOP, _PANEL, _BETWEEN, _BELOW = 0.8, 1.95, 2.5, 1.45, 0.55  # inches


def write_figure(outcomes: Sequence[Outcome], file: Path) -> Path:
    """Write the figure and return its file."""
    rows = len(outcomes)
    height = _TOP + rows * _PANEL + (rows - 1) * _BETWEEN + _BELOW
    figure = Figure(figsize=(18.5, height), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    _title(figure, outcomes)
    grid = figure.add_gridspec(
        rows, 4, left=_LEFT / 18.5, right=0.97, top=1 - _TOP / height, bottom=_BELOW / height,
        wspace=0.55, hspace=_BETWEEN / _PANEL,
    )  # fmt: skip
    for row, outcome in enumerate(outcomes):
        colours = {arm.name: colour for arm, colour in zip(outcome.comparison.arms, _COLOURS, strict=True)}
        metric = outcome.task.metrics[0]
        _metric_panel(new_panel(figure, grid[row, 0], _capital(metric.label), "step"), outcome, colours)
        _parameters_panel(new_panel(figure, grid[row, 1], "Live parameters", "step"), outcome, colours)
        _time_panel(new_panel(figure, grid[row, 2], "Time of a training step", "step"), outcome, colours)
        _units_panel(new_panel(figure, grid[row, 3], "Units at the end", "layer"), outcome, colours)
        place = grid[row, 0].get_position(figure)
        figure.text(
            place.x0, place.y1 + 0.6 / height, _capital(outcome.task.network),
            fontsize=13, fontweight="bold", color="#555555",
        )  # fmt: skip
    figure.savefig(file)
    return file


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _title(figure: Figure, outcomes: Sequence[Outcome]) -> None:
    width, height = figure.get_size_inches()
    settings, environment = outcomes[0].settings, outcomes[0].environment
    stopped = "  (interrupted)" if outcomes[-1].interrupted else ""
    seeds = len(settings["seeds"])
    averaged = " (thin lines; thick: their mean)" if seeds > 1 else ""
    figure.text(
        _LEFT / width, 1 - 0.42 / height, f"Networks that shrink while they train: DemP beside dense{stopped}",
        fontsize=16, fontweight="bold", color=INK,
    )  # fmt: skip
    figure.text(
        _LEFT / width, 1 - 0.6 / height,
        f"{outcomes[0].facts['data']}, {settings['steps']:,} steps, batch {outcomes[0].facts['batch']}, "
        f"{count(seeds, 'seed')}{averaged}, same optimizer, data order and initialization, each at its own best rate\n"
        f"{environment['device']}, {count(environment['threads'], 'thread')}, torch {environment['torch']}, "
        f"torsion {environment['torsion']}, {backends_used(environment)}",
        fontsize=9.5, color="#555555", va="top", linespacing=1.5,
    )  # fmt: skip


def _arms(axes: Axes, outcome: Outcome, colours: Colours, curve: Any, shown: str) -> list[Any]:
    """Draw every arm's runs, and name their ends; returns the ends of the means."""
    ends = []
    for name, colour in colours.items():
        runs = [run for run in outcome.runs if run.plan.arm.name == name and run.loss]
        end = draw_runs(axes, [curve(run) for run in runs], colour)
        if end:
            ends.append((*end, f"{name} {end[1]:{shown}}", colour))
    axes.set_xlim(0, outcome.settings["steps"])
    return ends


def _metric_panel(axes: Axes, outcome: Outcome, colours: Colours) -> None:
    metric = outcome.task.metrics[0]

    def curve(run: Run) -> tuple[list[float], list[float]]:
        return [point["step"] for point in run.evaluations], [point[metric.key] for point in run.evaluations]

    ends = _arms(axes, outcome, colours, curve, f".{metric.digits}f")
    # Nothing is left out: while scales shrink, the running statistics that evaluation uses lag behind.
    note(axes, f"{metric.unit}, with running statistics, which lag while scales shrink")
    if metric.unit == "%":
        axes.set_ylim(0, 103)
    _shade(axes, outcome)
    label_ends(axes, ends)


def _shade(axes: Axes, outcome: Outcome) -> None:
    """The steps in which lasso and noise act."""
    for arm in outcome.comparison.arms:
        if arm.shrinking:
            axes.axvspan(0, float(arm.shrinking.span) * outcome.settings["steps"], color="#f3ece6", zorder=-1)


def _parameters_panel(axes: Axes, outcome: Outcome, colours: Colours) -> None:
    steps = outcome.settings["steps"]

    def curve(run: Run) -> tuple[list[int], list[float]]:
        sizes = run.sizes or [{"step": 0, "parameters": run.parameters}]
        made = len(run.loss)
        places = [size["step"] for size in sizes]
        counts = [size["parameters"] for size in sizes]
        # A staircase, with a value for each step, so that seeds can be averaged.
        staircase, at = [], 0
        for step in range(made + 1):
            at += at + 1 < len(places) and places[at + 1] <= step
            staircase.append(float(counts[at]))
        return list(range(made + 1)), staircase

    ends = _arms(axes, outcome, colours, curve, ",.0f")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(0, steps)
    _shade(axes, outcome)
    note(axes, "logarithmic; shaded: lasso and noise act")
    label_ends(axes, ends)


def _time_panel(axes: Axes, outcome: Outcome, colours: Colours) -> None:
    def curve(run: Run) -> tuple[list[int], list[float]]:
        # A median first: single steps that the machine held up would bend the mean.
        window = max(1, len(run.training_ms) // 30)
        half = window // 2
        times = [
            statistics.median(run.training_ms[max(0, index - half) : index + half + 1])
            for index in range(len(run.training_ms))
        ]
        return run.timed_steps, smoothed(times, window)

    ends = _arms(axes, outcome, colours, curve, ".1f")
    axes.set_ylim(bottom=0)
    finish = [
        f"{arm.name} {statistics.fmean(seconds):.1f} s"
        for arm in outcome.comparison.arms
        if (seconds := [run.seconds for run in outcome.of(arm) if run.finished])
    ]
    note(axes, f"milliseconds; to finish, windows included: {', '.join(finish) or '-'}")
    label_ends(axes, ends)


def _units_panel(axes: Axes, outcome: Outcome, colours: Colours) -> None:
    names: list[str] = []
    for index, (name, colour) in enumerate(colours.items()):
        runs = [run for run in outcome.runs if run.plan.arm.name == name and run.units]
        if not runs:
            continue
        names = list(runs[0].units)
        heights = [statistics.fmean(run.units[layer] for run in runs) for layer in names]
        places = [place + 0.38 * (index - 0.5) for place in range(len(names))]
        axes.bar(places, heights, width=0.36, color=colour, alpha=0.28 if index == 0 else 1.0)
        for place, height in zip(places, heights, strict=True):
            axes.text(place, height, f"{height:.0f}", ha="center", va="bottom", fontsize=9, color=colour)
    axes.set_xticks(range(len(names)), names)
    note(axes, "mean over seeds; pale: dense" if len(outcome.settings["seeds"]) > 1 else "pale: dense")
    axes.margins(y=0.12)
