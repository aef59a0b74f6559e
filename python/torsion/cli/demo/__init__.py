"""`torsion demo`: train a real model with a torsion optimizer beside the one in use today, each at its best rate.

    digits   handwritten digits and a small ConvNet: SGD with momentum against TAM, five seeds, about half a minute
    text     Python's own source and a byte-level GPT: AdamW against AdaTAMW, one seed, a few minutes

Writes results.json and a PNG into --out. Ctrl-C stops after the current step, reports what there is and exits with 130.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from torsion.cli.demo.environment import backend_of, describe, interruptible, reproducible
from torsion.cli.demo.rates import best_rate
from torsion.cli.demo.registry import ALL, METHODS, Arm, select_arms
from torsion.cli.demo.tasks import Data, Task, find_task, task_names
from torsion.cli.demo.training import Plan, Run, train
from torsion.cli.usage import integer_from, require_extra, resolve_device, usable_processors, writable_directory

__all__ = ["add_arguments", "run"]

_INTERRUPTED = 130  # 128 + SIGINT, what a shell reports for a program ended by Ctrl-C


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `torsion demo`."""
    parser.description, parser.epilog = (__doc__ or "").split("\n")[0], (__doc__ or "").split("\n", 1)[1]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    tasks = [find_task(name) for name in task_names()]
    steps, threads = (
        ", ".join(f"{getattr(task, what)} {task.name}" for task in tasks) for what in ("steps", "threads")
    )
    add("--task", choices=task_names(), default="digits", help="what to train on (default: digits)")
    # Not `choices`: whether a method has a comparison depends on the task.
    known = ",".join((*METHODS, ALL))
    add("--method", default="tam", metavar=f"{{{known}}}", help="what to compare (default: tam)")
    add("--steps", metavar="N", type=integer_from(1, 10**7, 200), help=f"optimizer steps per run (default: {steps})")
    add("--threads", metavar="N", type=integer_from(1, 1024, 2), help=f"CPU threads (default: {threads})")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto takes a GPU when there is one")
    add(
        "--seed",
        metavar="N",
        type=integer_from(0, 2**31, 0),
        default=0,
        help="first seed; digits also runs the next four",
    )
    add("--out", metavar="DIR", type=Path, default=Path("demo-out"), help="directory for results (default: ./demo-out)")


def run(args: argparse.Namespace) -> int:
    """Check everything that can be refused, then train, then report whatever was done."""
    task = find_task(args.task)
    arms = select_arms(args.method, task.name)
    device = resolve_device(args.device)
    require_extra("demo", {"rich": "rich", "matplotlib": "matplotlib", **dict(task.extra_modules)})
    for arm in arms:
        backend_of(arm, device)
    rates = {arm.name: best_rate(task.name, arm.name) for arm in arms}
    out = writable_directory("--out", args.out)
    with reproducible(args.threads or min(task.threads, usable_processors()), device):
        return _run_all(task, arms, rates, device, args, out)


def _run_all(
    task: Task, arms: list[Arm], rates: dict[str, float], device: torch.device, args: argparse.Namespace, out: Path
) -> int:
    from torsion.cli.demo.plots import write_figure  # here, because they need the extra checked for above
    from torsion.cli.demo.report import Outcome, print_report, write_json

    steps, seeds = args.steps or task.steps, [args.seed + index for index in range(task.seeds)]
    data = task.load(device)
    # Arms take turns within a seed, so that a disturbance of the machine falls on all of them.
    plans = [Plan(task, arm, rates[arm.name], seed, steps, device) for seed in seeds for arm in arms]
    begin = time.perf_counter()
    with interruptible() as stop:
        runs = _train_all(plans, data, stop)
        interrupted = stop()
    settings: dict[str, Any] = {"method": args.method, "steps": steps, "seeds": seeds, "rates": rates}
    outcome = Outcome(
        task, arms, runs, interrupted, time.perf_counter() - begin, settings, data.facts, describe(device, arms)
    )
    files = [out / "results.json", out / f"{task.name}.png"]
    write_json(outcome, files[0])
    write_figure(outcome, files[1])
    print_report(outcome, files)
    return _INTERRUPTED if interrupted else 0


def _train_all(plans: list[Plan], data: Data, stop: Callable[[], bool]) -> list[Run]:
    from torsion.cli.demo.progress import Bars

    runs: list[Run] = []
    with Bars(plans) as bars:
        for index, plan in enumerate(plans):
            if stop():
                break
            bars.start(index)
            runs.append(train(plan, data, lambda *shown, index=index: bars.advance(index, *shown), stop))
    return runs
