"""Record how good each arm is at each learning rate: `python -m torsion.cli.demo.grid` rewrites rates.json.

Rates are compared on parts of the training data that are held out for this alone, a fold per seed; what the demo
reports was never used to choose. The task says by which metric, and the best mean over the seeds wins. Where an arm has
a strength, every rate is tried with every strength. A best value at the edge of the grid is no answer, so the grid
grows by its own factor until the best one has neighbours on both sides.

An arm that prunes is chosen otherwise: of the points that are by no more than the task's tolerance worse than the dense
arm at its best, the one that leaves the fewest parameters. Its other settings are then varied one at a time at that
point, for the record; they were set by hand after a handful of such runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from torsion.cli.demo.arms import Choice
from torsion.cli.demo.environment import describe, reproducible
from torsion.cli.demo.rates import RECORD, choice_of, load_record
from torsion.cli.demo.registry import arms_on
from torsion.cli.demo.tasks import Data, Metric, Task, find_task, task_names
from torsion.cli.demo.training import Plan, train
from torsion.cli.usage import Parser, UsageError, integer_from, require_extra, resolve_device

__all__ = ["main"]

_GROWTH_AT_MOST = 4


def main(argv: list[str] | None = None) -> int:
    """Measure the grid of the asked tasks and arms and write the record after every arm."""
    parser = Parser(prog="python -m torsion.cli.demo.grid", description="Record the demo's learning-rate grid.")
    parser.add_argument("--task", choices=task_names(variants=True), help="only this task (default: every one)")
    parser.add_argument("--arm", help="only this arm, such as TAM (default: every one)")
    parser.add_argument("--seeds", type=integer_from(1, 100, 5), help="seeds per rate (default: 5 digits, 2 text)")
    parser.add_argument("--steps", type=integer_from(1, 10**7, 500), help="steps per run (default: the task's)")
    parser.add_argument("--threads", type=integer_from(1, 1024, 1), default=1, help="CPU threads (default: 1)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu", help="default: cpu")
    parser.add_argument("--out", type=Path, default=RECORD, help="file to write (default: the package's rates.json)")
    args = parser.parse_args(argv)
    try:
        device = resolve_device(args.device)
        with reproducible(args.threads, device):
            for name in [args.task] if args.task else task_names(variants=True):
                _record_task(find_task(name), args, device)
    except UsageError as error:
        parser.error(str(error))
    return 0


def _record_task(task: Task, args: argparse.Namespace, device: torch.device) -> None:
    require_extra("demo", dict(task.extra_modules))
    steps = args.steps or task.steps
    folds = [task.load(device, tuning_fold=seed) for seed in range(args.seeds or task.tuning_seeds)]
    arms = [arm for arm in arms_on(task.name) if args.arm in (None, arm.name)]
    if not arms:
        known = ", ".join(arm.name for arm in arms_on(task.name))
        raise UsageError(f"--arm {args.arm}: unknown on --task {task.name}; choose from {known}")
    for arm in arms:
        record = load_record(args.out)
        limit = _limit(task, record) if arm.shrinking else None
        plan = Plan(_curveless(task), arm, Choice(arm.rates[0]), 0, arm.steps(steps), device)
        grid = _search(plan, folds, limit)
        best = choice_of(_best(grid, task.chosen_by, limit))
        variations = _varied(dataclasses.replace(plan, choice=best), folds)
        record.setdefault(task.name, {})[arm.name] = {
            "best": best.rate,
            **({"best strength": best.strength, "strength": arm.strength.name} if arm.strength else {}),
            "chosen by": task.choose_by,
            "settings": arm.settings,
            "steps": arm.steps(steps),
            "seeds": len(folds),
            "data": folds[0].facts,
            "environment": describe(device, [arm]),
            **({"limit": limit, "variations": variations} if limit is not None else {}),
            "grid": grid,
        }
        args.out.write_text(_compact(record), encoding="utf-8")
        found = f"best rate {best.rate:g}" + (f", {arm.strength.name} {best.strength:g}" if arm.strength else "")
        print(f"{task.name} {arm.name}: {found}, written to {args.out}")


def _curveless(task: Task) -> Task:
    # Only the end of a run is compared.
    return dataclasses.replace(task, evaluations=1, weight_noise=())


def _limit(task: Task, record: dict[str, Any]) -> float:
    """The worst mean that a pruned network may have: the dense one's at its best, with the task's tolerance."""
    dense = record.get(task.name, {}).get("dense")
    if dense is None:
        raise UsageError(f"--arm: on --task {task.name} record dense first, which the others are measured by")
    metric = task.chosen_by
    best = statistics.fmean(_best(dense["grid"], metric)[metric.key])
    return round(best - task.tolerance if metric.higher_is_better else best + task.tolerance, 5)


def _varied(plan: Plan, folds: list[Data]) -> list[dict[str, Any]]:
    """What becomes of the chosen point with one setting of the pruning at another value."""
    shrinking = plan.arm.shrinking
    if shrinking is None:
        return []
    points = []
    for changed in (
        dataclasses.replace(shrinking, noise_std=5e-5),
        dataclasses.replace(shrinking, noise_std=4 * shrinking.noise_std),
        dataclasses.replace(shrinking, span=shrinking.span * 3 / 4),
        dataclasses.replace(shrinking, windows=shrinking.windows // 2),
        dataclasses.replace(shrinking, windows=2 * shrinking.windows),
        dataclasses.replace(shrinking, batches=2 * shrinking.batches),
    ):
        arm = dataclasses.replace(plan.arm, shrinking=changed)
        points.append({"settings": changed.words, **_measure(dataclasses.replace(plan, arm=arm), folds)})
    return points


def _search(plan: Plan, folds: list[Data], limit: float | None = None) -> list[dict[str, Any]]:
    arm, metric = plan.arm, plan.task.chosen_by
    rates, strengths = list(arm.rates), list(arm.strength.values) if arm.strength else [0.0]
    measured: dict[tuple[float, float], dict[str, Any]] = {}
    for growth in range(_GROWTH_AT_MOST + 1):
        for place in itertools.product(strengths, rates):
            if place not in measured:
                strength, rate = place
                measured[place] = _measure(dataclasses.replace(plan, choice=Choice(rate, strength)), folds)
        best = choice_of(_best(_in_order(measured), metric, limit))
        grown = _grow(rates, best.rate) or _grow(strengths, best.strength)
        if not grown or growth == _GROWTH_AT_MOST:
            break
    return _in_order(measured)


def _in_order(measured: dict[tuple[float, float], dict[str, Any]]) -> list[dict[str, Any]]:
    return [measured[place] for place in sorted(measured)]


def _grow(values: list[float], best: float) -> bool:
    """Add a value beyond the best one if it lies at an edge."""
    if len(values) < 2 or best not in (values[0], values[-1]):
        return False
    lower = best == values[0]
    beyond = values[0] ** 2 / values[1] if lower else values[-1] ** 2 / values[-2]
    values.insert(0 if lower else len(values), float(f"{beyond:.6g}"))
    return True


def _measure(plan: Plan, folds: list[Data]) -> dict[str, Any]:
    point: dict[str, Any] = {"rate": plan.choice.rate}
    if plan.arm.strength:
        point["strength"] = plan.choice.strength
    for seed, data in enumerate(folds):  # each seed its own held-out fold
        run = train(dataclasses.replace(plan, seed=seed), data, lambda made, loss, rate: None, lambda: False)
        for metric in plan.task.metrics:
            # A loss that is no number is a diverged run, whatever its accuracy. JSON has no nan: it is recorded as
            # null, and its point cannot win.
            value = run.final(metric.key) if math.isfinite(run.final("loss")) else math.nan
            point.setdefault(metric.key, []).append(round(value, 5) if math.isfinite(value) else None)
        if plan.arm.shrinking:
            point.setdefault("parameters left", []).append(round(run.parameters_left / run.parameters, 5))
    print(f"{plan.task.name} {plan.arm.name} {json.dumps(point)}", file=sys.stderr, flush=True)
    return point


def _best(grid: list[dict[str, Any]], metric: Metric, limit: float | None = None) -> dict[str, Any]:
    """The best point by the metric, of equally good ones the first; with a limit, the smallest of those within it."""
    sound = [point for point in grid if None not in point[metric.key]]
    if not sound:
        raise UsageError("every rate diverged; lower the arm's rates in arms.py")
    sign = -1 if metric.higher_is_better else 1
    within = [
        point for point in sound if limit is not None and sign * (statistics.fmean(point[metric.key]) - limit) <= 0
    ]
    if within:
        return min(within, key=lambda point: statistics.fmean(point["parameters left"]))
    return min(sound, key=lambda point: sign * statistics.fmean(point[metric.key]))


def _compact(record: dict[str, Any]) -> str:
    # One line per rate: the record is read by people, in diffs.
    text = json.dumps(record, indent=2)
    for task in record.values():
        for entry in task.values():
            for point in entry["grid"] + entry.get("variations", []):
                spread_out = json.dumps(point, indent=2).replace("\n", "\n" + " " * 8)
                text = text.replace(spread_out, json.dumps(point))
    return text + "\n"


if __name__ == "__main__":
    sys.exit(main())
