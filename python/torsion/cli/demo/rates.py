"""The recorded grid of learning rates (rates.json, written by grid.py) and the best rate it found for each arm."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from torsion.cli.usage import UsageError

__all__ = ["RECORD", "best_rate", "grid_points", "load_record", "spread"]

RECORD = Path(__file__).with_name("rates.json")


def load_record(path: Path = RECORD) -> dict[str, Any]:
    """Everything recorded: task -> arm -> settings, environment, best rate and one entry per rate."""
    if not path.exists():
        return {}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def best_rate(task: str, arm: str) -> float:
    """The arm's own best rate on the task."""
    entry = load_record().get(task, {}).get(arm)
    if entry is None:
        raise UsageError(
            f"--task {task}: no recorded rate for {arm}; run: python -m torsion.cli.demo.grid --task {task}"
        )
    return float(entry["best"])


def grid_points(task: str, arm: str) -> list[tuple[float, float]]:
    """(rate, mean over seeds of the metric by which rates are chosen), runs that diverged left out."""
    points = load_record().get(task, {}).get(arm, {}).get("grid", [])
    return [(point["rate"], statistics.fmean(point["loss"])) for point in points if None not in point["loss"]]


def spread(task: str, arm: str, metric: str) -> float | None:
    """Standard deviation over seeds of a metric at the arm's best rate; None when nothing says."""
    entry = load_record().get(task, {}).get(arm, {})
    for point in entry.get("grid", []):
        values = [float(value) for value in point.get(metric, []) if value is not None]
        if point["rate"] == entry["best"] and len(values) > 1:
            return statistics.stdev(values)
    return None
