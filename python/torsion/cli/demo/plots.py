"""The figures of a demo run: what was learned, what it cost, and what is particular to the method."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from torsion.cli.demo import panels
from torsion.cli.demo.outcome import Outcome, backends_used, count
from torsion.cli.demo.panels import INK, Colours, new_panel
from torsion.cli.demo.tasks import Metric

__all__ = ["write_figures"]

# Okabe and Ito's colours, told apart in every common form of colour blindness; the baseline is the quiet one.
_COLOURS = ("#5a5a5a", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9")


def write_figures(outcome: Outcome, directory: Path, name: str) -> list[Path]:
    """Write `name.png`, and `name-weight-noise.png` where that was measured; returns the files."""
    colours = {
        arm.name: _COLOURS[index % len(_COLOURS)]
        for block in outcome.comparison.blocks
        for index, arm in enumerate(block.arms)
    }
    figures = {name: (_rows if outcome.several else _overview)(outcome, colours)}
    if outcome.task.weight_noise:
        figures[f"{name}-weight-noise"] = _weight_noise(outcome, colours)
    files = []
    for stem, figure in figures.items():
        files.append(directory / f"{stem}.png")
        figure.savefig(files[-1])
    return files


def _overview(outcome: Outcome, colours: Colours) -> Figure:
    """Five panels for one block of arms."""
    figure = _figure(13.5, 7.6)
    grid = figure.add_gridspec(2, 3, left=0.055, right=0.985, top=0.765, bottom=0.08, wspace=0.29, hspace=0.56)
    _title(figure, outcome)
    block, metric = outcome.comparison.blocks[0], outcome.task.metrics[0]
    panels.loss_panel(new_panel(figure, grid[0, 0], "Training loss", "step"), outcome, block, colours)
    panels.metric_panel(new_panel(figure, grid[0, 1], _heading(metric), "step"), outcome, block, colours, metric)
    panels.rates_panel(new_panel(figure, grid[0, 2], "How the rates were chosen", "learning rate"), outcome, colours)
    panels.damping_panel(new_panel(figure, grid[1, :2], "Damping of the incoming gradient", "step"), outcome, colours)
    panels.cost_panel(new_panel(figure, grid[1, 2], "Cost of one step", "milliseconds (median)"), outcome, colours)
    return figure


def _rows(outcome: Outcome, colours: Colours) -> Figure:
    """One row of curves per block, and in the last column what they share."""
    metrics = [metric for metric in outcome.task.metrics if metric.key != "loss"]
    columns = len(metrics) + 2
    figure = _figure(4.6 * columns, 8.6)
    grid = figure.add_gridspec(
        2, columns, left=0.17 / columns, right=1 - 0.35 / columns, top=0.755, bottom=0.07, wspace=0.4, hspace=0.72
    )
    _title(figure, outcome)
    for row, block in enumerate(outcome.comparison.blocks):
        across = "gradient evaluations" if block.in_gradients else "step"
        axes = new_panel(figure, grid[row, 0], "Training loss", across)
        panels.loss_panel(axes, outcome, block, colours)
        for column, metric in enumerate(metrics, start=1):
            axes = new_panel(figure, grid[row, column], _heading(metric), across)
            panels.metric_panel(axes, outcome, block, colours, metric)
        place = grid[row, 0].get_position(figure)
        figure.text(place.x0, place.y1 + 0.075, f"Equal {block.equal}", fontsize=13, fontweight="bold", color="#555555")
    axes = new_panel(figure, grid[0, -1], "How the rates were chosen", "learning rate")
    panels.rates_panel(axes, outcome, colours)
    axes = new_panel(figure, grid[1, -1], "Cost of one step", "milliseconds (median)")
    panels.cost_panel(axes, outcome, colours)
    return figure


def _weight_noise(outcome: Outcome, colours: Colours) -> Figure:
    figure = _figure(13.5, 5.6)
    grid = figure.add_gridspec(1, 2, left=0.055, right=0.89, top=0.66, bottom=0.11, wspace=0.36)
    _title(figure, outcome)
    for column, block in enumerate(outcome.comparison.blocks):
        title = f"{_heading(outcome.task.metrics[0])} under weight noise, equal {block.equal}"
        axes = new_panel(figure, grid[0, column], title, "noise on each tensor, relative to its root mean square")
        panels.weight_noise_panel(axes, outcome, block, colours)
    return figure


def _figure(width: float, height: float) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _heading(metric: Metric) -> str:
    return metric.label[0].upper() + metric.label[1:]


def _title(figure: Figure, outcome: Outcome) -> None:
    names = [arm.name for arm in outcome.comparison.blocks[0].arms]
    baseline, others = names[0], " and ".join(names[1:])
    stopped = "  (interrupted)" if outcome.interrupted else ""
    width, height = figure.get_size_inches()
    left, line = 0.74 / width, 1 / height
    figure.text(
        left, 1 - 0.456 * line, f"{others} beside {baseline}: {outcome.task.summary}{stopped}",
        fontsize=16, fontweight="bold", color=INK,
    )  # fmt: skip
    settings, environment = outcome.settings, outcome.environment
    seeds = len(settings["seeds"])
    averaged = " (thin lines; thick: their mean)" if seeds > 1 else ""
    parameters = f"{outcome.runs[0].parameters:,} parameters, " if outcome.runs else ""
    figure.text(
        left, 1 - 0.669 * line,
        f"{parameters}{settings['steps']:,} steps{_longer(outcome)}, batch {outcome.facts['batch']}, "
        f"{count(seeds, 'seed')}{averaged}, same data order and initialization, "
        f"warm-up and cosine decay, {_tuned(outcome)}"
        f"{environment['device']}, {count(environment['threads'], 'thread')}, torch {environment['torch']}, "
        f"torsion {environment['torsion']}, {backends_used(environment)}",
        fontsize=9.5, color="#555555", va="top", linespacing=1.5,
    )  # fmt: skip


def _longer(outcome: Outcome) -> str:
    most = max(arm.evaluations for arm in outcome.comparison.arms)
    return f" or {most * outcome.settings['steps']:,} gradients" if most > 1 else ""


def _tuned(outcome: Outcome) -> str:
    names = {arm.strength.name: None for arm in outcome.comparison.arms if arm.strength}
    if not names:
        return "each optimizer at its own best rate\n"
    return f"each optimizer at\nits own best rate and {' or '.join(names)}; "
