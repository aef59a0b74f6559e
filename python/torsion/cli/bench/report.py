"""Figures for a reader: a table, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torsion.cli.bench.figures import QUOTABLE, Figure, Place
from torsion.cli.bench.timing import DISTURBED

__all__ = ["render", "write_plot"]

_HEAD = ("list", "what", "ms", "ratio", "20..80 %", "against", "required", "", "GB/s", "copy", "rounds")
_RIGHT = (2, 3, 8, 9, 10)


def render(figures: Sequence[Figure], facts: dict[str, Any], place: Place) -> str:
    """The table, headed and followed by the conditions under which it holds."""
    where = f"{facts['device']}" + (
        f", {place.threads} thread{'s'[: place.threads > 1]}" if place.device.type == "cpu" else ""
    )
    clocks = sorted({figure.clock for figure in figures if figure.unit == "x" and figure.clock})
    lines = [
        f"torsion {facts['torsion']}, torch {facts['torch']}, {where}, float32"
        + (f"; {', '.join(clocks)}, medians over interleaved rounds" if clocks else ""),
        "",
        *_table([_HEAD, *(_row(figure) for figure in figures)]),
        *_notes(figures),
    ]
    return "\n".join(lines)


def _row(figure: Figure) -> tuple[str, ...]:
    bound = ""
    if figure.limit is not None:
        bound = f"{'>=' if figure.at_least else '<='} {_shown(figure.limit, figure.unit)}"
    verdict = {None: "", True: "ok", False: "MISSED"}[figure.passed]
    spread = ""
    if figure.p20 is not None and figure.p80 is not None:
        low, high = _shown(figure.p20, figure.unit), _shown(figure.p80, figure.unit)
        spread = f"{low}..{high}"
    rate = "" if figure.gigabytes_per_second is None else f"{figure.gigabytes_per_second:.1f}"
    copy = "" if figure.copy_percent is None else f"{figure.copy_percent:.0f} %"
    rounds = f"{figure.rounds}" + (f"-{figure.dropped}" if figure.dropped else "") if figure.rounds else ""
    return (
        figure.list,
        figure.what,
        ""
        if figure.seconds is None
        else f"{figure.seconds * 1e3:.3g}"
        if figure.seconds < 0.1
        else f"{figure.seconds * 1e3:.0f}",
        "-" if figure.value is None else _shown(figure.value, figure.unit),
        spread,
        figure.against,
        bound,
        verdict,
        rate,
        copy,
        rounds,
    )


def _shown(value: float, unit: str) -> str:
    if unit == "bytes":
        return f"{value / 2**20:.2f} MiB"
    if unit == "s":
        return f"{value:.2f} s" if value >= 0.01 else f"{value * 1e6:.0f} us"
    if unit == "%":
        return f"{value:.0f} %"
    if unit == "launches":
        return f"{value:.0f}"
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[k]) for row in rows) for k in range(len(_HEAD))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(w) if k in _RIGHT else cell.ljust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines


def _notes(figures: Sequence[Figure]) -> list[str]:
    notes = [
        "ms: median per step. ratio: median of contestant / baseline, round by round. GB/s: bytes the method cannot do",
        "without / time. copy: those GB/s as a share of a copy's in the same rounds; the copy is as large as the list.",
    ]
    dropped = sum(figure.dropped for figure in figures)
    if dropped:
        notes.append(f"rounds n-d: d rounds dropped, their baseline above {DISTURBED} times its own median.")
    if any(not figure.quotable and figure.value is not None for figure in figures):
        notes.append(f"fewer than {QUOTABLE} rounds: to look at, not to quote.")
    lists: dict[tuple[str, str], list[str]] = {}
    for figure in figures:
        if figure.note:
            lists.setdefault((figure.what.rsplit(", peak")[0].rsplit(", held")[0], figure.note), []).append(figure.list)
    notes += [f"{what} ({', '.join(dict.fromkeys(on))}): {note}." for (what, note), on in lists.items()]
    return ["", *notes]


def write_plot(path: Path, figures: Sequence[Figure], facts: dict[str, Any], place: Place) -> None:
    """Draw every ratio as a bar, with its span and its limit, one panel for each list."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    ratios = [figure for figure in figures if figure.unit == "x" and figure.value is not None]
    ratios = [figure for figure in ratios if figure.what != figure.against]
    lists = list(dict.fromkeys(figure.list for figure in ratios)) or [""]
    canvas = Canvas(
        figsize=(11, 1.2 + sum(0.7 + 0.34 * sum(f.list == name for f in ratios) for name in lists)), dpi=130
    )
    FigureCanvasAgg(canvas)
    heights = [0.7 + 0.34 * sum(f.list == name for f in ratios) for name in lists]
    grid = canvas.add_gridspec(len(lists), 1, height_ratios=heights, left=0.34, right=0.97, hspace=0.5)
    for k, name in enumerate(lists):
        _panel(canvas.add_subplot(grid[k, 0]), name, [figure for figure in ratios if figure.list == name])
    canvas.suptitle(
        f"{facts['device']}, {place.threads} threads, torch {facts['torch']}: time of a step over its baseline",
        fontsize=10,
    )
    canvas.savefig(path)


def _panel(axes: Any, name: str, ratios: Sequence[Figure]) -> None:
    places = range(len(ratios), 0, -1)
    colours = ["#D55E00" if figure.passed is False else "#0072B2" if figure.passed else "#8a8a8a" for figure in ratios]
    axes.barh(places, [figure.value for figure in ratios], height=0.6, color=colours)
    for at, figure in zip(places, ratios, strict=True):
        axes.plot([figure.p20, figure.p80], [at, at], color="#222222", linewidth=1.2)
        if figure.limit is not None:
            axes.plot([figure.limit] * 2, [at - 0.42, at + 0.42], color="#222222", linewidth=2)
    axes.set_yticks(list(places), [f"{figure.what}  /  {figure.against}" for figure in ratios], fontsize=8)
    axes.axvline(1.0, color="#222222", linewidth=0.6, linestyle=":")
    axes.set_xscale("log")
    axes.set_title(name, loc="left", fontsize=10, fontweight="bold")
