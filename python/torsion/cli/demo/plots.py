"""The figure of a demo run: what was learned, what it cost, and what the damping did."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from torsion.cli.demo.comparison import smoothed
from torsion.cli.demo.rates import grid_points
from torsion.cli.demo.registry import Arm
from torsion.cli.demo.report import Outcome, count
from torsion.cli.demo.training import Run

__all__ = ["write_figure"]

# Okabe and Ito's colours, told apart in every common form of colour blindness; the baseline is the quiet one.
_COLOURS = ("#5a5a5a", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9")
_INK, _FAINT = "#222222", "#9a9a9a"


def write_figure(outcome: Outcome, path: Path) -> None:
    """Draw the five panels and write them as a PNG."""
    figure = Figure(figsize=(13.5, 7.6), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 3, left=0.055, right=0.985, top=0.765, bottom=0.08, wspace=0.29, hspace=0.56)
    colours = {arm.name: _COLOURS[index % len(_COLOURS)] for index, arm in enumerate(outcome.arms)}
    _title(figure, outcome, colours)
    _loss(_panel(figure, grid[0, 0], "Training loss", "step"), outcome, colours)
    _metric(_panel(figure, grid[0, 1], _heading(outcome), "step"), outcome, colours)
    _rates(_panel(figure, grid[0, 2], "How the rates were chosen", "learning rate"), outcome, colours)
    _damping(_panel(figure, grid[1, :2], "Damping of the incoming gradient", "step"), outcome, colours)
    _cost(_panel(figure, grid[1, 2], "Cost of one step", "milliseconds (median)"), outcome, colours)
    figure.savefig(path)


def _panel(figure: Figure, place: Any, title: str, xlabel: str) -> Axes:
    axes = figure.add_subplot(place)
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=_INK, pad=20)
    axes.set_xlabel(xlabel, fontsize=9, color=_INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)
    axes.tick_params(colors=_INK, labelsize=8.5, color=_FAINT)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def _note(axes: Axes, text: str) -> None:
    axes.text(0, 1.025, text, transform=axes.transAxes, fontsize=8.5, color="#6a6a6a")


def _title(figure: Figure, outcome: Outcome, colours: dict[str, str]) -> None:
    names = [arm.name for arm in outcome.arms]
    baseline, others = names[0], " and ".join(names[1:])
    stopped = "  (interrupted)" if outcome.interrupted else ""
    figure.text(
        0.055, 0.94, f"{others} beside {baseline}: {outcome.task.summary}{stopped}",
        fontsize=16, fontweight="bold", color=_INK,
    )  # fmt: skip
    settings, environment = outcome.settings, outcome.environment
    seeds = len(settings["seeds"])
    averaged = " (thin lines; thick: their mean)" if seeds > 1 else ""
    parameters = f"{outcome.runs[0].parameters:,} parameters, " if outcome.runs else ""
    backends = ", ".join(f"{name} on back end {used}" for name, used in environment["back ends"].items())
    figure.text(
        0.055, 0.912,
        f"{parameters}{settings['steps']:,} steps, batch {outcome.facts['batch']}, "
        f"{count(seeds, 'seed')}{averaged}, same data order and initialization, "
        f"warm-up and cosine decay, each optimizer at its own best rate\n"
        f"{environment['device']}, {count(environment['threads'], 'thread')}, torch {environment['torch']}, "
        f"torsion {environment['torsion']}, {backends}",
        fontsize=9.5, color="#555555", va="top", linespacing=1.5,
    )  # fmt: skip


def _heading(outcome: Outcome) -> str:
    label = outcome.task.metrics[0].label
    return label[0].upper() + label[1:]


def _mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    # Cut to the shortest: an interrupted seed would bend the mean of the others where it ends.
    return [statistics.fmean(values) for values in zip(*curves, strict=False)]


def _label_ends(axes: Axes, ends: list[tuple[float, float, str, str]], below: float = 0.075) -> None:
    """Write names at the right ends of curves, moved apart (in axes height) where they would touch."""
    to_axes = axes.transData + axes.transAxes.inverted()
    places = sorted(((float(to_axes.transform((x, y))[1]), text, colour) for x, y, text, colour in ends), reverse=True)
    previous = math.inf
    for height, text, colour in places:
        previous = min(height, previous - below)
        axes.text(
            1.01, previous, text, transform=axes.transAxes, color=colour, fontsize=9.5, fontweight="bold", va="center"
        )


def _draw(axes: Axes, curves: list[tuple[Sequence[float], Sequence[float]]], colour: str) -> tuple[float, float] | None:
    """Thin lines for the seeds, a thick one for their mean; returns where the mean ends."""
    if not curves:
        return None
    if len(curves) > 1:
        for steps, values in curves:
            axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.35)
    longest = max((steps for steps, _ in curves), key=len)
    mean = _mean_curve([values for _, values in curves])
    if not mean:
        return None
    axes.plot(longest[: len(mean)], mean, color=colour, linewidth=2.2, solid_capstyle="round")
    return (longest[len(mean) - 1], mean[-1]) if math.isfinite(mean[-1]) else None


def _loss(axes: Axes, outcome: Outcome, colours: dict[str, str]) -> None:
    ends = []
    for arm in outcome.arms:
        curves = [(range(1, len(run.loss) + 1), smoothed(run.loss, outcome.window)) for run in outcome.of(arm)]
        end = _draw(axes, list(curves), colours[arm.name])
        if end:
            ends.append((*end, arm.name, colours[arm.name]))
    _note(axes, f"cross-entropy in nats, logarithmic, mean over {outcome.window} steps")
    axes.set_yscale("log")
    axes.set_xlim(0, outcome.settings["steps"])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    _label_ends(axes, ends)


def _metric(axes: Axes, outcome: Outcome, colours: dict[str, str]) -> None:
    metric = outcome.task.metrics[0]
    ends, seen = [], []
    for arm in outcome.arms:
        curves = [
            ([point["step"] for point in run.evaluations], [point[metric.key] for point in run.evaluations])
            for run in outcome.of(arm)
            if run.evaluations
        ]
        seen += [value for _, values in curves for value in values if math.isfinite(value)]
        end = _draw(axes, list(curves), colours[arm.name])
        if end:
            ends.append((*end, f"{end[1]:.{metric.digits}f}", colours[arm.name]))
    examples = outcome.facts.get("held-out examples")
    note = f"{metric.unit}, mean over seeds at the right" if len(outcome.settings["seeds"]) > 1 else f"{metric.unit}"
    _note(axes, f"{note}; one image of {examples} is {100 / examples:.2f}" if examples else note)
    axes.set_xlim(0, outcome.settings["steps"])
    if seen:
        _zoom(axes, seen, metric.higher_is_better)
    _label_ends(axes, ends)


def _zoom(axes: Axes, values: list[float], higher_is_better: bool) -> None:
    # The first evaluations are far off and would press the end, which is what is compared, into a line.
    ordered = sorted(values, reverse=higher_is_better)
    best, typical = ordered[0], ordered[int(0.85 * (len(ordered) - 1))]
    margin = 0.06 * abs(typical - best) or 0.05 * abs(best) or 1.0
    low, high = min(best, typical) - margin, max(best, typical) + margin
    axes.set_ylim(low, min(high, 100.0 + margin) if higher_is_better else high)


def _rates(axes: Axes, outcome: Outcome, colours: dict[str, str]) -> None:
    task, tried = outcome.task.name, set[float]()
    for arm in outcome.arms:
        points = grid_points(task, arm.name)
        if not points:
            continue
        rates, losses = zip(*points, strict=True)
        tried.update(rates)
        axes.plot(rates, losses, color=colours[arm.name], linewidth=1.4, marker="o", markersize=4)
        best = outcome.settings["rates"][arm.name]
        chosen = dict(points).get(best)
        if chosen is not None:
            axes.plot([best], [chosen], color=colours[arm.name], marker="o", markersize=9)
            axes.annotate(
                f"{arm.name} {best:g}", (best, chosen), xytext=(0, -15), textcoords="offset points",
                ha="center", color=colours[arm.name], fontsize=9.5, fontweight="bold",
            )  # fmt: skip
    _note(axes, "recorded loss on held-out parts of the training data")
    axes.set_xscale("log")
    axes.set_xticks(sorted(tried), [f"{rate:g}" for rate in sorted(tried)])
    axes.minorticks_off()
    axes.margins(y=0.2)


def _damping(axes: Axes, outcome: Outcome, colours: dict[str, str]) -> None:
    steps, ends = outcome.settings["steps"], []
    for arm in outcome.arms:
        runs = [run for run in outcome.of(arm) if run.observed.get("damping")]
        if not runs:
            continue
        cosine = runs[0].observed["cosine"]
        heights = [(1 + value) / 2 for value in cosine]
        axes.scatter(range(1, len(cosine) + 1), heights, s=5, color=colours[arm.name], alpha=0.22, linewidths=0)
        end = _draw(axes, _series(runs, "damping"), colours[arm.name])
        if end:
            ends.append((*end, f"{end[1]:.2f}", colours[arm.name]))
    axes.axhline(0.5, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(0, steps)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    _note(axes, "line: damping d, the factor on each new gradient; dots: (1 + cosine)/2 of single steps, first seed")
    meanings = (
        (0.96, "1: aligned with the momentum, taken in full"),
        (0.31, "dashed, 1/2: orthogonal, taken by half"),
        (0.04, "0: opposed, dropped"),
    )
    for height, text in meanings:
        axes.text(0.995, height, text, transform=axes.transAxes, ha="right", va="center", fontsize=8.5, color=_FAINT)
    _label_ends(axes, ends)


def _series(runs: Sequence[Run], name: str) -> list[tuple[Sequence[float], Sequence[float]]]:
    return [(range(1, len(run.observed[name]) + 1), run.observed[name]) for run in runs]


def _cost(axes: Axes, outcome: Outcome, colours: dict[str, str]) -> None:
    arms = [arm for arm in outcome.arms if any(run.training_ms for run in outcome.of(arm))]
    for row, arm in enumerate(arms):
        whole, own = (_median_of(arm, outcome, which) for which in ("training_ms", "optimizer_ms"))
        axes.barh(row, whole, height=0.5, color=colours[arm.name], alpha=0.28)
        axes.barh(row, own, height=0.5, color=colours[arm.name])
        axes.text(
            0, row - 0.36, f"{arm.name}: optimizer {own:.2f} ms of {whole:.2f} ms",
            va="center", fontsize=9.5, fontweight="bold", color=colours[arm.name],
        )  # fmt: skip
    _note(axes, "solid: optimizer.step() alone; pale: the whole training step")
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.spines["left"].set_visible(False)
    if arms:
        axes.set_ylim(len(arms) - 0.5, -0.7)


def _median_of(arm: Arm, outcome: Outcome, which: str) -> float:
    return statistics.median(run.median_ms(which) for run in outcome.of(arm) if run.training_ms)
