"""The panels that the demo's figures are made of: curves over the steps, the recorded grid, the cost of a step."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from torsion.cli.demo.arms import Arm
from torsion.cli.demo.comparison import smoothed
from torsion.cli.demo.outcome import Outcome, count
from torsion.cli.demo.rates import grid_points
from torsion.cli.demo.registry import Block
from torsion.cli.demo.tasks import Metric
from torsion.cli.demo.training import Run
from torsion.cli.demo.weight_noise import DRAWS

__all__ = [
    "INK",
    "Colours",
    "cost_panel",
    "damping_panel",
    "draw_runs",
    "label_ends",
    "loss_panel",
    "metric_panel",
    "new_panel",
    "note",
    "rates_panel",
    "weight_noise_panel",
]

INK, _FAINT = "#222222", "#9a9a9a"
#: Arm's name -> colour.
Colours = Mapping[str, str]


def new_panel(figure: Figure, place: Any, title: str, xlabel: str) -> Axes:
    """Axes with a title, as all panels have them."""
    axes = figure.add_subplot(place)
    axes.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=20)
    axes.set_xlabel(xlabel, fontsize=9, color=INK)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(_FAINT)
    axes.tick_params(colors=INK, labelsize=8.5, color=_FAINT)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return axes


def note(axes: Axes, text: str) -> None:
    """A line between title and panel."""
    axes.text(0, 1.025, text, transform=axes.transAxes, fontsize=8.5, color="#6a6a6a")


def _mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    # Cut to the shortest: an interrupted seed would bend the mean of the others where it ends.
    return [statistics.fmean(values) for values in zip(*curves, strict=False)]


def label_ends(axes: Axes, ends: list[tuple[float, float, str, str]], below: float = 0.075) -> None:
    """Write names at the right ends of curves, moved apart (in axes height) where they would touch."""
    to_axes = axes.transData + axes.transAxes.inverted()
    places = sorted(((float(to_axes.transform((x, y))[1]), text, colour) for x, y, text, colour in ends), reverse=True)
    previous = math.inf
    for height, text, colour in places:
        previous = min(height, previous - below)
        axes.text(
            1.01, previous, text, transform=axes.transAxes, color=colour, fontsize=9.5, fontweight="bold", va="center"
        )


def draw_runs(
    axes: Axes, curves: list[tuple[Sequence[float], Sequence[float]]], colour: str
) -> tuple[float, float] | None:
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


def _horizontal(block: Block, arm: Arm, steps: Sequence[float]) -> list[float]:
    """Places on the block's x axis of these steps of the arm."""
    return [step * arm.evaluations if block.in_gradients else step for step in steps]


def _limit(axes: Axes, outcome: Outcome, block: Block) -> None:
    steps = outcome.settings["steps"]
    axes.set_xlim(0, max(_horizontal(block, arm, [arm.steps(steps)])[0] for arm in block.arms))


def loss_panel(axes: Axes, outcome: Outcome, block: Block, colours: Colours) -> None:
    """Training loss over the steps."""
    ends = []
    for arm in block.arms:
        curves = [
            (_horizontal(block, arm, range(1, len(run.loss) + 1)), smoothed(run.loss, outcome.window))
            for run in outcome.of(arm)
        ]
        end = draw_runs(axes, list(curves), colours[arm.name])
        if end:
            ends.append((*end, arm.name, colours[arm.name]))
    note(axes, f"cross-entropy in nats, logarithmic, mean over {outcome.window} steps")
    axes.set_yscale("log")
    _limit(axes, outcome, block)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    label_ends(axes, ends)


def metric_panel(axes: Axes, outcome: Outcome, block: Block, colours: Colours, metric: Metric) -> None:
    """A metric over the steps."""
    ends, seen = [], []
    for arm in block.arms:
        curves = [
            (
                _horizontal(block, arm, [point["step"] for point in run.evaluations]),
                [point[metric.key] for point in run.evaluations],
            )
            for run in outcome.of(arm)
            if run.evaluations
        ]
        seen += [value for _, values in curves for value in values if math.isfinite(value)]
        end = draw_runs(axes, list(curves), colours[arm.name])
        if end:
            ends.append((*end, f"{end[1]:.{metric.digits}f}", colours[arm.name]))
    examples = outcome.facts.get("held-out examples")
    said = f"{metric.unit}, mean over seeds at the right" if len(outcome.settings["seeds"]) > 1 else f"{metric.unit}"
    first = metric is outcome.task.metrics[0]
    note(axes, f"{said}; one image of {examples} is {100 / examples:.2f}" if examples and first else said)
    _limit(axes, outcome, block)
    if seen:
        _zoom(axes, seen, metric.higher_is_better, [end[1] for end in ends])
    label_ends(axes, ends)


def weight_noise_panel(axes: Axes, outcome: Outcome, block: Block, colours: Colours) -> None:
    """The first metric of the finished models against the level of noise on their weights."""
    metric, ends = outcome.task.metrics[0], []
    levels = (0.0, *outcome.task.weight_noise)
    heights = [height for run in outcome.runs for height in _under_noise(run)]
    for arm in block.arms:
        curves = [(levels, _under_noise(run)) for run in outcome.of(arm) if run.weight_noise]
        end = draw_runs(axes, list(curves), colours[arm.name])
        if end:
            ends.append((*end, f"{arm.name} {end[1]:.{metric.digits}f}", colours[arm.name]))
    note(axes, f"{metric.unit}, mean over {DRAWS} draws of the noise, the same for all")
    axes.set_xlim(0, levels[-1])
    axes.set_xticks(levels, [f"{level:g}" for level in levels])
    if heights:  # of all blocks, so that their panels have the same axis
        _zoom(axes, heights, metric.higher_is_better, [min(heights), max(heights)])
    label_ends(axes, ends)


def _under_noise(run: Run) -> list[float]:
    if not run.weight_noise:
        return []
    key = run.plan.task.metrics[0].key
    return [run.final(key), *(statistics.fmean(values) for values in run.weight_noise.values())]


def _zoom(axes: Axes, values: list[float], higher_is_better: bool, shown: Sequence[float]) -> None:
    """Leave out the worst values, but for those that must be `shown`."""
    # The first evaluations are far off and would press the end, which is what is compared, into a line.
    ordered = sorted(values, reverse=higher_is_better)
    kept = [ordered[0], ordered[int(0.85 * (len(ordered) - 1))], *shown]
    low, high = min(kept), max(kept)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin
    axes.set_ylim(low, min(high, 100.0 + margin) if higher_is_better else high)


def rates_panel(axes: Axes, outcome: Outcome, colours: Colours) -> None:
    """The recorded grid: the metric by which was chosen, at each rate."""
    metric, drawn, tried, ends = outcome.task.chosen_by, list[float](), set[float](), []
    for arm in outcome.comparison.arms:
        points = grid_points(outcome.task.name, arm.name)
        if not points:
            continue
        rates, means = zip(*points, strict=True)
        tried.update(rates)
        drawn.extend(means)
        axes.plot(
            rates, means, color=colours[arm.name], linewidth=1.4, marker="o", markersize=4,
            linestyle="-" if arm.length == 1 else (0, (4, 2)),
        )  # fmt: skip
        best = outcome.settings["rates"][arm.name]
        chosen = dict(points).get(best)
        if chosen is not None:
            axes.plot([best], [chosen], color=colours[arm.name], marker="o", markersize=9)
            ends.append((best, chosen, f"{arm.name} {best:g}", colours[arm.name]))
    axes.set_xscale("log")
    axes.set_xticks(sorted(tried), [f"{rate:g}" for rate in sorted(tried)])
    axes.minorticks_off()
    if outcome.several:  # more names than fit beside the points, and failed runs that would press the others together
        note(axes, f"recorded {metric.key} on held-out training data, best: large; dashed: longer runs")
        _zoom(axes, drawn, metric.higher_is_better, [end[1] for end in ends])
        label_ends(axes, ends)
    else:
        note(axes, f"recorded {metric.key} on held-out parts of the training data")
        axes.margins(y=0.2)
        _label_below(axes, ends)


def _label_below(axes: Axes, points: list[tuple[float, float, str, str]]) -> None:
    for x, y, text, colour in points:
        axes.annotate(
            text, (x, y), xytext=(0, -15), textcoords="offset points",
            ha="center", color=colour, fontsize=9.5, fontweight="bold",
        )  # fmt: skip


def damping_panel(axes: Axes, outcome: Outcome, colours: Colours) -> None:
    """How much of each new gradient was taken, over the steps."""
    steps, ends = outcome.settings["steps"], []
    for arm in outcome.comparison.arms:
        runs = [run for run in outcome.of(arm) if run.observed.get("damping")]
        if not runs:
            continue
        cosine = runs[0].observed["cosine"]
        heights = [(1 + value) / 2 for value in cosine]
        axes.scatter(range(1, len(cosine) + 1), heights, s=5, color=colours[arm.name], alpha=0.22, linewidths=0)
        end = draw_runs(axes, _series(runs, "damping"), colours[arm.name])
        if end:
            ends.append((*end, f"{end[1]:.2f}", colours[arm.name]))
    axes.axhline(0.5, color=_FAINT, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(0, steps)
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1])
    note(axes, "line: damping d, the factor on each new gradient; dots: (1 + cosine)/2 of single steps, first seed")
    meanings = (
        (0.96, "1: aligned with the momentum, taken in full"),
        (0.31, "dashed, 1/2: orthogonal, taken by half"),
        (0.04, "0: opposed, dropped"),
    )
    for height, text in meanings:
        axes.text(0.995, height, text, transform=axes.transAxes, ha="right", va="center", fontsize=8.5, color=_FAINT)
    label_ends(axes, ends)


def _series(runs: Sequence[Run], name: str) -> list[tuple[Sequence[float], Sequence[float]]]:
    return [(range(1, len(run.observed[name]) + 1), run.observed[name]) for run in runs]


def cost_panel(axes: Axes, outcome: Outcome, colours: Colours) -> None:
    """Milliseconds per step, and how many gradients these are for."""
    arms = [arm for arm in outcome.comparison.blocks[0].arms if any(run.training_ms for run in outcome.of(arm))]
    for row, arm in enumerate(arms):
        whole, own = (_median_of(arm, outcome, which) for which in ("training_ms", "optimizer_ms"))
        axes.barh(row, whole, height=0.5, color=colours[arm.name], alpha=0.28)
        axes.barh(row, own, height=0.5, color=colours[arm.name])
        axes.text(
            0, row - 0.36, f"{arm.name}{_gradients(arm)}: optimizer {own:.2f} ms of {whole:.2f} ms",
            va="center", fontsize=9.5, fontweight="bold", color=colours[arm.name],
        )  # fmt: skip
    note(axes, "solid: optimizer.step() alone; pale: the whole training step")
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.spines["left"].set_visible(False)
    if arms:
        axes.set_ylim(len(arms) - 0.5, -0.7)


def _gradients(arm: Arm) -> str:
    return f", {count(arm.evaluations, 'gradient')}" if arm.evaluations > 1 else ""


def _median_of(arm: Arm, outcome: Outcome, which: str) -> float:
    return statistics.median(run.median_ms(which) for run in outcome.of(arm) if run.training_ms)
