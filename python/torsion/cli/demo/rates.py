"""What each arm was tuned to: the recorded grid (rates.json, written by grid.py) and the best point it found."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from torsion.cli.demo.arms import Choice
from torsion.cli.demo.tasks import find_task
from torsion.cli.usage import UsageError

__all__ = ["RECORD", "best_choice", "choice_of", "grid_points", "load_record", "spread"]

RECORD = Path(__file__).with_name("rates.json")


def load_record(path: Path = RECORD) -> dict[str, Any]:
    """Everything recorded: task -> arm -> settings, environment, best point and one entry per point of the grid."""
    if not path.exists():
        return {}
    record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return record


def best_choice(task: str, arm: str) -> Choice:
    """What is best for this arm on the task."""
    entry = load_record().get(task, {}).get(arm)
    if entry is None:
        raise UsageError(
            f"--task {task}: no recorded rate for {arm}; run: python -m torsion.cli.demo.grid --task {task}"
        )
    return Choice(float(entry["best"]), float(entry.get("best strength", 0.0)))


def choice_of(point: dict[str, Any]) -> Choice:
    """The settings of a recorded point."""
    return Choice(point["rate"], point.get("strength", 0.0))


def grid_points(task: str, arm: str) -> list[tuple[float, float]]:
    """(rate, mean over seeds of the metric by which is chosen) at the best strength; runs that diverged left out."""
    entry = load_record().get(task, {}).get(arm, {})
    key = find_task(task).choose_by
    points = [point for point in entry.get("grid", []) if point.get("strength") == entry.get("best strength")]
    return [(point["rate"], statistics.fmean(point[key])) for point in points if None not in point[key]]


def spread(task: str, arm: str, metric: str) -> float | None:
    """Standard deviation over seeds of a metric at the arm's best point; None when nothing says."""
    entry = load_record().get(task, {}).get(arm, {})
    for point in entry.get("grid", []):
        values = [float(value) for value in point.get(metric, []) if value is not None]
        best = (point["rate"], point.get("strength")) == (entry["best"], entry.get("best strength"))
        if best and len(values) > 1:
            return statistics.stdev(values)
    return None
