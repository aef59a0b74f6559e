"""Figures for a reader: a table, and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torsion.cli.bench.figures import QUOTABLE, Figure, Place
from torsion.cli.bench.timing import DISTURBED

__all__ = ["render", "write_plot"]

_HEAD = (
    "list",
    "what",
    "ms",
    "ratio",
    "20..80 %",
    "against",
    "required",
    "",
    "grads",
    "B/el",
    "GB/s",
    "copy",
    "rounds",
)
_RIGHT = (2, 3, 8, 9, 10, 11, 12)


def render(figures: Sequence[Figure], facts: dict[str, Any], place: Place) -> str:
    """The table, headed and followed by the conditions under which it holds."""
    where = _where(facts, place)
    clocks = sorted({figure.clock for figure in figures if figure.unit == "x" and figure.clock})
    lines = [
        f"torsion {facts['torsion']}, torch {facts['torch']}, {where}, float32"
        + (f"; {', '.join(clocks)}, medians over interleaved rounds" if clocks else ""),
        "",
        *_table([_HEAD, *(_row(figure) for figure in figures)]),
        *_notes(figures),
    ]
    return "\n".join(lines)


def _where(facts: dict[str, Any], place: Place) -> str:
    threads = f", {place.threads} thread{'s' if place.threads > 1 else ''}" if place.device.type == "cpu" else ""
    return f"{facts['device']}{threads}"


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
        "" if figure.evaluations is None else str(figure.evaluations),
        "" if figure.bytes_per_element is None else str(figure.bytes_per_element),
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
    if unit in ("launches", "gradients"):
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
        "ms: median per step, or per cycle with its gradients (grads: counted) off the clock. ratio: median of",
        "contestant / baseline, round by round. B/el: bytes per element that the method cannot do without. GB/s: those",
        "bytes / time. copy: those GB/s as a share of a copy's in the same rounds; the copy is as large as the list.",
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
    """Draw every ratio as a dot with its span and its limit, one panel for each list on one common scale."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    ratios = [f for f in figures if f.unit == "x" and f.value is not None and f.what != f.against]
    lists = list(dict.fromkeys(f.list for f in ratios)) or [""]
    heights = [0.75 + 0.3 * sum(f.list == name for f in ratios) for name in lists]
    canvas = Canvas(figsize=(11, 0.9 + sum(heights)), dpi=130)
    FigureCanvasAgg(canvas)
    grid = canvas.add_gridspec(
        len(lists), 1, height_ratios=heights, left=0.43, right=0.97, hspace=0.3,
        top=1 - 0.8 / canvas.get_figheight(), bottom=0.4 / canvas.get_figheight(),
    )  # fmt: skip
    reach = [x for f in ratios for x in (f.p20, f.p80, f.limit, 1.0) if x is not None] or [1.0]
    for k, name in enumerate(lists):
        axes = canvas.add_subplot(grid[k, 0])
        _panel(axes, name, [f for f in ratios if f.list == name])
        axes.set_xlim(min(reach) / 1.15, max(reach) * 1.15)
    canvas.suptitle(f"Time of a step over its baseline: {_where(facts, place)}, torch {facts['torch']}", fontsize=10)
    canvas.savefig(path)


def _panel(axes: Any, name: str, ratios: Sequence[Figure]) -> None:
    from matplotlib.ticker import FixedLocator, FormatStrFormatter, NullLocator

    places = list(range(len(ratios), 0, -1))
    for at, figure in zip(places, ratios, strict=True):
        # Okabe and Ito's colours: kept, missed, nothing asked.
        colour = {True: "#0072B2", False: "#D55E00", None: "#5a5a5a"}[figure.passed]
        axes.plot([figure.p20, figure.p80], [at, at], color=colour, linewidth=2.5, alpha=0.45)
        axes.plot([figure.value], [at], "o", color=colour, markersize=6)
        if figure.limit is not None:
            axes.plot([figure.limit] * 2, [at - 0.35, at + 0.35], color="#222222", linewidth=1.8)
    axes.set_yticks(places, [f"{figure.what}  /  {figure.against}" for figure in ratios], fontsize=8)
    axes.set_ylim(0.4, len(ratios) + 0.6)
    axes.axvline(1.0, color="#222222", linewidth=0.6, linestyle=":")
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator([0.1, 0.2, 0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50, 100]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(axis="x", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_title(f"{name} (bar: required)", loc="left", fontsize=9.5, fontweight="bold")
