"""What a demo leaves behind: the table on standard output and results.json."""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from torsion.cli.demo.comparison import compare, summarize
from torsion.cli.demo.registry import Arm
from torsion.cli.demo.tasks import Task
from torsion.cli.demo.training import Run

__all__ = ["Outcome", "count", "print_report", "write_json"]


@dataclass(frozen=True)
class Outcome:
    """Everything that was asked and done in one call of the demo.

    Attributes:
        task: what was trained on.
        arms: the optimizers compared, baseline first.
        runs: those that made at least one step, in the order they were made.
        interrupted: whether Ctrl-C ended it early.
        seconds: wall time of all runs together.
        settings: the arguments as used.
        facts: what the data were.
        environment: versions, device, threads and back ends.
    """

    task: Task
    arms: Sequence[Arm]
    runs: Sequence[Run]
    interrupted: bool
    seconds: float
    settings: dict[str, Any]
    facts: dict[str, Any]
    environment: dict[str, Any]

    def of(self, arm: Arm) -> list[Run]:
        """The runs of one arm."""
        return [run for run in self.runs if run.plan.arm.name == arm.name]

    @property
    def window(self) -> int:
        """Steps over which loss curves are averaged, for plots and for the final training loss."""
        return max(1, int(self.settings["steps"]) // 20)


def print_report(outcome: Outcome, files: Sequence[Path]) -> None:
    """Print the table, one sentence per comparison, and where the files are."""
    # A pipe has no width of its own; this one holds every table without wrapping.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(_table(outcome))
    baseline, *others = [outcome.of(arm) for arm in outcome.arms]
    for other in others:
        if baseline and other:
            for metric in outcome.task.metrics:
                console.print(compare(baseline, other, metric))
    skipped = sum(run.skipped_steps or 0 for run in outcome.runs)
    if skipped:
        console.print(f"{skipped} steps were skipped because a gradient was not finite.")
    load, processors = outcome.environment["load average"], outcome.environment["processors"]
    if load is not None and load > processors + 1:
        console.print(
            f"Other work shared the machine (load {load:.1f} on {processors} processors): times are inflated."
        )
    if outcome.interrupted:
        console.print("Interrupted: unfinished runs count in the table as far as they came, not in the comparison.")
    console.print(
        f"{len(outcome.runs)} runs in {outcome.seconds:.1f} s. Written: {', '.join(str(file) for file in files)}"
    )


def _table(outcome: Outcome) -> Table:
    environment, settings = outcome.environment, outcome.settings
    backends = ", ".join(f"{name} on back end {used}" for name, used in environment["back ends"].items())
    table = Table(
        title=f"{outcome.task.name}: {outcome.task.summary}\n{settings['steps']} steps, {_seeds(settings['seeds'])}, "
        f"{environment['device']}, {count(environment['threads'], 'thread')}, torch {environment['torch']}, {backends}",
        box=box.SIMPLE_HEAD,
        caption="mean ± standard deviation over seeds; milliseconds are medians; training loss and damping are means\n"
        f"over the last {outcome.window} steps; opt. step is the optimizer alone, train step includes it",
    )
    table.add_column("optimizer")
    metrics = [f"{metric.label.replace(' ', chr(10), 1)}, {metric.unit}" for metric in outcome.task.metrics]
    for heading in ("best\nrate", *metrics, "training\nloss", "ms/opt.\nstep", "ms/train\nstep", "damping"):
        table.add_column(heading, justify="right")
    for arm in outcome.arms:
        table.add_row(*_row(arm, outcome))
    return table


def _row(arm: Arm, outcome: Outcome) -> list[str]:
    runs = outcome.of(arm)
    cells = [arm.name, f"{outcome.settings['rates'][arm.name]:g}"]
    for metric in outcome.task.metrics:
        cells.append(summarize([run.final(metric.key) for run in runs]).show(metric.digits))
    cells.append(summarize([_tail(run.loss, outcome.window) for run in runs]).show(4))
    for which in ("optimizer_ms", "training_ms"):
        cells.append(f"{summarize([run.median_ms(which) for run in runs]).mean:.2f}" if runs else "-")
    damping = [_tail(run.observed["damping"], outcome.window) for run in runs if "damping" in run.observed]
    cells.append(f"{summarize(damping).mean:.2f}" if damping else "-")
    return cells


def _tail(values: Sequence[float], window: int) -> float:
    return statistics.fmean(values[-window:])


def count(number: int, noun: str) -> str:
    """`1 thread`, `2 threads`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed {seeds[0]}" if len(seeds) == 1 else f"seeds {seeds[0]} to {seeds[-1]}"


def write_json(outcome: Outcome, path: Path) -> None:
    """Write settings, environment, data and every series; not-a-number becomes null, as JSON wants it."""
    record = {
        "task": outcome.task.name,
        "interrupted": outcome.interrupted,
        "seconds": outcome.seconds,
        "settings": outcome.settings,
        "data": outcome.facts,
        "environment": outcome.environment,
        "runs": [_run(run) for run in outcome.runs],
    }
    path.write_text(json.dumps(_finite(record), indent=1) + "\n", encoding="utf-8")


def _run(run: Run) -> dict[str, Any]:
    return {
        "optimizer": run.plan.arm.name,
        "settings": run.plan.arm.settings,
        "rate": run.plan.rate,
        "seed": run.plan.seed,
        "finished": run.finished,
        "steps": len(run.loss),
        "parameters": run.parameters,
        "skipped_steps": run.skipped_steps,
        "timing": {
            "optimizer_ms_median": run.median_ms("optimizer_ms"),
            "training_ms_median": run.median_ms("training_ms"),
            "steps_timed": len(run.training_ms),
        },
        "evaluations": run.evaluations,
        "loss": run.loss,
        **run.observed,
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
