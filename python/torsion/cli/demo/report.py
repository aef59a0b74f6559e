"""What a demo leaves behind: the tables on standard output, the figures and results.json."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from torsion.cli.demo import plots, shrinkage_plots
from torsion.cli.demo.comparison import Difference, seed_noise
from torsion.cli.demo.outcome import Outcome
from torsion.cli.demo.shrinkage import first_and_last_ms, gains, shrinkage_table
from torsion.cli.demo.tables import difference_table, result_table
from torsion.cli.demo.training import Run

__all__ = ["print_report", "write_figures", "write_json"]


def write_figures(outcomes: Sequence[Outcome], directory: Path, name: str) -> list[Path]:
    """Write `name.png` and what else there is to show; returns the files."""
    if outcomes[0].comparison.shrinks:
        return [shrinkage_plots.write_figure(outcomes, directory / f"{name}.png")]
    return plots.write_figures(outcomes[0], directory, name)


def print_report(outcomes: Sequence[Outcome], files: Sequence[Path]) -> None:
    """Print the tables, what can be said of the differences, and where the files are."""
    # A pipe has no width of its own; this one holds every table without wrapping.
    console = Console(file=sys.stdout, width=None if sys.stdout.isatty() else 120, highlight=False)
    for outcome in outcomes:
        if outcome.comparison.shrinks:
            _print_shrinkage(console, outcome)
        else:
            _print_differences(console, outcome)
    runs = [run for outcome in outcomes for run in outcome.runs]
    skipped = sum(run.skipped_steps or 0 for run in runs)
    if skipped:
        console.print(f"{skipped} steps were skipped because a gradient was not finite.")
    load, processors = outcomes[-1].environment["load average"], outcomes[-1].environment["processors"]
    if load is not None and load > processors + 1:
        console.print(
            f"Other work shared the machine (load {load:.1f} on {processors} processors): times are inflated."
        )
    if outcomes[-1].interrupted:
        console.print("Interrupted: unfinished runs count in the table as far as they came, not in the comparison.")
    seconds = sum(outcome.seconds for outcome in outcomes)
    console.print(f"{len(runs)} runs in {seconds:.1f} s. Written: {', '.join(str(file) for file in files)}")


def _print_differences(console: Console, outcome: Outcome) -> None:
    blocks = outcome.comparison.blocks
    for block in blocks:
        console.print(result_table(outcome, block))
    if outcome.several:
        console.print(difference_table(outcome))
        if len(outcome.settings["seeds"]) == 1:
            console.print(f"One seed. {_seed_noise(outcome)}")
    else:
        for difference in outcome.differences(blocks[0]):
            console.print(difference.sentence())


def _print_shrinkage(console: Console, outcome: Outcome) -> None:
    console.print(shrinkage_table(outcome))
    for difference in outcome.differences(outcome.comparison.blocks[0]):
        console.print(difference.sentence())
    for sentence in gains(outcome):
        console.print(sentence)
    console.print()


def _seed_noise(outcome: Outcome) -> str:
    metric = outcome.task.metrics[0]
    return f"{metric.label}: {seed_noise([run for run in outcome.runs if run.plan.arm.length == 1], metric)}"


def write_json(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write settings, environment, data and every series; not-a-number becomes null, as JSON wants it.

    A method that prunes has an entry of "networks" for each network.
    """
    records = [_record(outcome) for outcome in outcomes]
    record = {"networks": records} if outcomes[0].comparison.shrinks else records[0]
    path.write_text(json.dumps(_finite(record), indent=1) + "\n", encoding="utf-8")


def _record(outcome: Outcome) -> dict[str, Any]:
    return {
        "task": outcome.task.name,
        "interrupted": outcome.interrupted,
        "seconds": outcome.seconds,
        "settings": outcome.settings,
        "data": outcome.facts,
        "environment": outcome.environment,
        "comparisons": [
            {
                "equal": block.equal,
                "optimizers": [arm.name for arm in block.arms],
                "differences": [_difference(difference) for difference in outcome.differences(block)],
            }
            for block in outcome.comparison.blocks
        ],
        "runs": [_run(run) for run in outcome.runs],
    }


def _run(run: Run) -> dict[str, Any]:
    return {
        "optimizer": run.plan.arm.name,
        "settings": run.plan.arm.settings,
        "rate": run.plan.choice.rate,
        **({run.plan.arm.strength.name: run.plan.choice.strength} if run.plan.arm.strength else {}),
        "seed": run.plan.seed,
        "finished": run.finished,
        "steps": len(run.loss),
        "gradients": run.gradients,
        "parameters": run.parameters,
        "skipped_steps": run.skipped_steps,
        "timing": {
            "optimizer_ms_median": run.median_ms("optimizer_ms"),
            "training_ms_median": run.median_ms("training_ms"),
            "steps_timed": len(run.training_ms),
            "training_seconds": run.seconds,
            **(_pruned_timing(run) if run.units else {}),
        },
        "evaluations": run.evaluations,
        "weight_noise": run.weight_noise,
        "loss": run.loss,
        **run.observed,
        **(_pruned(run) if run.units else {}),
    }


def _pruned(run: Run) -> dict[str, Any]:
    return {
        "units": run.units,
        "live": run.live,
        "parameters_left": run.parameters_left,
        "sizes": run.sizes,
    }


def _pruned_timing(run: Run) -> dict[str, Any]:
    first, last = first_and_last_ms(run)
    return {
        "first_tenth_ms_median": first,
        "last_tenth_ms_median": last,
        "inference_ms_median": run.median_ms("inference_ms"),
        "training_ms": run.training_ms,
        "window_ms": run.window_ms,
    }


def _difference(difference: Difference) -> dict[str, Any]:
    return {
        "of": difference.names,
        "metric": difference.metric.key,
        "mean": difference.mean,
        "margin": difference.margin,
        "verdict": difference.verdict,
    }


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list) else value
