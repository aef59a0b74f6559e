"""`torsion demo`: train a real model with a torsion method beside what is in use today, each at its best rate.

    --method tam          TAM beside SGD on digits, AdaTAMW beside AdamW on text
    --method lookbehind   Lookbehind and SAM beside SGD on digits, a fifth of the training labels wrong, and then with
                          noise on the weights; Lookbehind(AdamW) beside AdamW on text; over equal epochs and with
                          equally many gradient evaluations
    --method demp         networks that shrink while they train, beside the same ones left dense, on the same optimizer:
                          a convolutional network and an MLP on digits, a ReLU transformer on text
    --method all          one after the other, each into a directory of its own below --out

    --task digits         handwritten digits, small networks, three to five seeds: half a minute to one and a half
    --task text           Python's own source, a byte-level GPT, one seed: one (demp) to a few minutes

Writes results.json and PNGs into --out. Ctrl-C stops after the current step, reports what there is and exits with 130.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from torsion.cli.demo.aftermath import measure
from torsion.cli.demo.environment import backend_of, describe, interruptible, reproducible
from torsion.cli.demo.outcome import Outcome
from torsion.cli.demo.rates import best_choice
from torsion.cli.demo.registry import ALL, METHODS, Comparison, Method, select
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
    threads = ", ".join(f"{task.threads} {task.name}" for task in tasks)
    steps = "; ".join(f"{name}: {_default_steps(method)}" for name, method in METHODS.items())
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
        help="first seed; digits also runs the next four (demp: two)",
    )
    add("--out", metavar="DIR", type=Path, default=Path("demo-out"), help="directory for results (default: ./demo-out)")


def _default_steps(method: Method) -> str:
    return ", ".join(f"{find_task(group[0].task).steps} {name}" for name, group in method.comparisons.items())


def run(args: argparse.Namespace) -> int:
    """Check everything that can be refused, then train, then report whatever was done."""
    groups = select(args.method, args.task)
    device = resolve_device(args.device)
    require_extra("demo", {"rich": "rich", "matplotlib": "matplotlib", **dict(find_task(args.task).extra_modules)})
    for comparison in (entry for group in groups.values() for entry in group):
        for arm in comparison.arms:
            backend_of(arm, device)
            best_choice(comparison.task, arm.name)
    out = writable_directory("--out", args.out)
    with interruptible() as stop:
        for name, group in groups.items():
            place = writable_directory("--out", out / name) if args.method == ALL else out
            _run_method(name, group, device, args, place, stop)
            if stop():
                return _INTERRUPTED
    return 0


def _run_method(
    method: str,
    group: Sequence[Comparison],
    device: torch.device,
    args: argparse.Namespace,
    out: Path,
    stop: Callable[[], bool],
) -> None:
    from torsion.cli.demo.report import print_report, write_figures, write_json  # they need the extra checked for above

    outcomes: list[Outcome] = []
    for comparison in group:
        task = find_task(comparison.task)
        with reproducible(args.threads or min(task.threads, usable_processors()), device):
            outcomes.append(_run_all(method, task, comparison, device, args, stop))
        if stop():
            break
    record = out / "results.json"
    write_json(outcomes, record)
    print_report(outcomes, [record, *write_figures(outcomes, out, args.task)])


def _run_all(
    method: str,
    task: Task,
    comparison: Comparison,
    device: torch.device,
    args: argparse.Namespace,
    stop: Callable[[], bool],
) -> Outcome:
    steps, seeds = args.steps or task.steps, [args.seed + index for index in range(task.seeds)]
    choices = {arm.name: best_choice(task.name, arm.name) for arm in comparison.arms}
    data = task.load(device)
    # Arms take turns within a seed, so that a disturbance of the machine falls on all of them.
    plans = [
        Plan(task, arm, choices[arm.name], seed, arm.steps(steps), device) for seed in seeds for arm in comparison.arms
    ]
    begin = time.perf_counter()
    runs = _train_all(plans, data, stop)
    if comparison.shrinks:
        measure(runs, data)
    settings: dict[str, Any] = {
        "method": method,
        "steps": steps,
        "seeds": seeds,
        "rates": {name: choice.rate for name, choice in choices.items()},
        "strengths": {arm.name: choices[arm.name].strength for arm in comparison.arms if arm.strength},
    }
    return Outcome(
        task, comparison, runs, stop(), time.perf_counter() - begin, settings, data.facts,
        describe(device, comparison.arms),
    )  # fmt: skip


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
