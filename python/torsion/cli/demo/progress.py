"""One progress bar per run, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from torsion.cli.demo.training import Plan

__all__ = ["Bars"]


class Bars:
    """Shows all planned runs from the start, so that the reader sees how much is left."""

    def __init__(self, plans: Sequence[Plan]) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}"),
            TextColumn("rate {task.fields[rate]}"),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=Console(file=sys.stderr),
        )
        names = [f"{plan.task.network}, {plan.arm.name}".removeprefix(", ") for plan in plans]
        width = max(map(len, names))
        self._bars: list[TaskID] = [
            self._progress.add_task(
                f"{name:<{width}} seed {plan.seed}", total=plan.steps, start=False, loss="-", rate="-"
            )
            for name, plan in zip(names, plans, strict=True)
        ]

    def __enter__(self) -> Bars:
        self._progress.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.stop()

    def start(self, index: int) -> None:
        """Start the clock of one run."""
        self._progress.start_task(self._bars[index])

    def advance(self, index: int, made: int, loss: float, rate: float) -> None:
        """Show how far a run has come."""
        self._progress.update(self._bars[index], completed=made, loss=f"{loss:.4f}", rate=f"{rate:.2e}")
