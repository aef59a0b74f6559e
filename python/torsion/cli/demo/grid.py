"""Record how good each arm is at each learning rate: `python -m torsion.cli.demo.grid` rewrites rates.json.

Rates are compared on parts of the training data that are held out for this alone, a fold per seed; what the demo
reports was never used to choose. The rate with the lowest mean loss wins. A best rate at the edge of the grid is no
answer, so the grid grows by its own factor until the best one has neighbours on both sides.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from torsion.cli.demo.environment import describe, reproducible
from torsion.cli.demo.rates import RECORD, load_record
from torsion.cli.demo.registry import ALL, Arm, select_arms
from torsion.cli.demo.tasks import Data, Task, find_task, task_names
from torsion.cli.demo.training import Plan, train
from torsion.cli.usage import Parser, UsageError, integer_from, require_extra, resolve_device

__all__ = ["main"]

_GROWTH_AT_MOST = 4
_SEEDS = {"digits": 5, "text": 2}


def main(argv: list[str] | None = None) -> int:
    """Measure the grid of the asked tasks and arms and write the record after every arm."""
    parser = Parser(prog="python -m torsion.cli.demo.grid", description="Record the demo's learning-rate grid.")
    parser.add_argument("--task", choices=task_names(), help="only this task (default: every one)")
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
            for name in [args.task] if args.task else task_names():
                _record_task(find_task(name), args, device)
    except UsageError as error:
        parser.error(str(error))
    return 0


def _record_task(task: Task, args: argparse.Namespace, device: torch.device) -> None:
    require_extra("demo", dict(task.extra_modules))
    steps = args.steps or task.steps
    folds = [task.load(device, tuning_fold=seed) for seed in range(args.seeds or _SEEDS[task.name])]
    arms = [arm for arm in select_arms(ALL, task.name) if args.arm in (None, arm.name)]
    if not arms:
        known = ", ".join(arm.name for arm in select_arms(ALL, task.name))
        raise UsageError(f"--arm {args.arm}: unknown on --task {task.name}; choose from {known}")
    for arm in arms:
        grid = _search(task, arm, folds, steps, device)
        record = load_record(args.out)
        record.setdefault(task.name, {})[arm.name] = {
            "best": _best(grid)["rate"],
            "settings": arm.settings,
            "steps": steps,
            "seeds": len(folds),
            "data": folds[0].facts,
            "environment": describe(device, [arm]),
            "grid": grid,
        }
        args.out.write_text(_compact(record), encoding="utf-8")
        print(f"{task.name} {arm.name}: best rate {_best(grid)['rate']:g}, written to {args.out}")


def _search(task: Task, arm: Arm, folds: list[Data], steps: int, device: torch.device) -> list[dict[str, Any]]:
    grid = [_measure(Plan(task, arm, rate, 0, steps, device, evaluations=1), folds) for rate in arm.rates]
    for _ in range(_GROWTH_AT_MOST):
        rates = [point["rate"] for point in grid]
        best = _best(grid)["rate"]
        if best not in (rates[0], rates[-1]) or len(rates) < 2:
            break
        lower = best == rates[0]
        rate = rates[0] ** 2 / rates[1] if lower else rates[-1] ** 2 / rates[-2]
        point = _measure(Plan(task, arm, rate, 0, steps, device, evaluations=1), folds)
        grid.insert(0 if lower else len(grid), point)
    return grid


def _measure(plan: Plan, folds: list[Data]) -> dict[str, Any]:
    point: dict[str, Any] = {"rate": plan.rate}
    for seed, data in enumerate(folds):  # each seed its own held-out fold
        run = train(dataclasses.replace(plan, seed=seed), data, lambda made, loss, rate: None, lambda: False)
        for metric in plan.task.metrics:
            value = run.final(metric.key)
            # JSON has no nan: a diverged run is recorded as null, and its rate cannot win.
            point.setdefault(metric.key, []).append(round(value, 5) if math.isfinite(value) else None)
    print(f"{plan.task.name} {plan.arm.name} {json.dumps(point)}", file=sys.stderr, flush=True)
    return point


def _best(grid: list[dict[str, Any]]) -> dict[str, Any]:
    sound = [point for point in grid if None not in point["loss"]]
    if not sound:
        raise UsageError("every rate diverged; lower the arm's rates in registry.py")
    return min(sound, key=lambda point: statistics.fmean(point["loss"]))


def _compact(record: dict[str, Any]) -> str:
    # One line per rate: the record is read by people, in diffs.
    text = json.dumps(record, indent=2)
    for task in record.values():
        for entry in task.values():
            for point in entry["grid"]:
                spread_out = json.dumps(point, indent=2).replace("\n", "\n" + " " * 8)
                text = text.replace(spread_out, json.dumps(point))
    return text + "\n"


if __name__ == "__main__":
    sys.exit(main())
