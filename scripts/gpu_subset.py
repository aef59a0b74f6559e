"""Few, small runs that reach every CUDA kernel: what scripts/gpu_check.sh gives to compute-sanitizer and to ncu.

python scripts/gpu_subset.py check             steps on the GPU against the CPU, eager and in a graph
python scripts/gpu_subset.py traffic LIST      one step of TAM and of SGD fused, between profiler marks
python scripts/gpu_subset.py ratio CSV         DRAM bytes of TAM and SGD from ncu's output, as one line of JSON
"""

from __future__ import annotations

import csv
import json
import os
import sys
from typing import Any

import torch
from torch import Tensor

import torsion

SIZES = (0, 1, 7, 333, 16384, 50001)
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Relative to the largest element: the order of sums moves a coefficient by its last bit, a rounding by one place."""
AT_MOST = 1.42
"""DRAM bytes of TAM over those of SGD with momentum; 28 / 20 are what the equations ask for."""


def tensors(dtype: torch.dtype, device: str, seed: int) -> list[Tensor]:
    """Odd sizes, the last one misaligned; the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(n + 1, generator=generator, dtype=torch.float64).to(dtype).to(device) for n in SIZES]
    return [t[:-1] for t in made[:-1]] + [made[-1][1:]]


class Run:
    """One optimizer on one device; its parameters stay misaligned where they are made so."""

    def __init__(self, cls: Any, dtype: torch.dtype, device: str, **options: Any) -> None:
        torch.manual_seed(5)
        self.dtype, self.device = dtype, device
        self.params = [torch.nn.Parameter(t) for t in tensors(dtype, device, 0)]
        if options.pop("tensor_lr", False):
            options["lr"] = torch.tensor(0.05, device=device)
        scale = options.pop("grad_scale", None)
        self.optimizer = cls(self.params, **options)
        if scale is not None:
            self.optimizer.grad_scale = torch.tensor(scale, device=device)
            self.optimizer.found_inf = torch.tensor(0.0, device=device)

    def gradients(self, seed: int) -> None:
        for p, g in zip(self.params, tensors(self.dtype, self.device, seed), strict=True):
            if p.grad is None:
                p.grad = g
            else:
                p.grad.copy_(g)

    def steps(self, count: int) -> None:
        for seed in range(1, count + 1):
            self.gradients(seed)
            self.optimizer.step()


def compare(title: str, one: Run, other: Run) -> bool:
    worst, equal, total = 0.0, 0, 0
    for a, b in zip(one.params, other.params, strict=True):
        x, y = a.detach().cpu(), b.detach().cpu()
        total += x.numel()
        equal += int((x == y).sum())
        if x.numel():
            scale = float(x.double().abs().max())
            worst = max(worst, float((x.double() - y.double()).abs().max()) / max(scale, 1e-30))
    good = worst <= TOLERANCE[one.dtype]
    print(f"{'ok' if good else 'FAILED':6} {title:44} {equal}/{total} elements equal, difference {worst:.1e}")
    return good


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "TAM": (torsion.TAM, {}),
    "TAM clone tensor": (torsion.TAM, {"init": "clone", "scope": "tensor", "weight_decay": 0.1}),
    "TAM clip scale": (torsion.TAM, {"max_grad_norm": 1.0, "grad_scale": 4.0, "tensor_lr": True}),
    "TAM maximize decoupled": (
        torsion.TAM,
        {"maximize": True, "weight_decay": 0.1, "decoupled_weight_decay": True},
    ),
    "AdaTAM": (torsion.AdaTAM, {"bias_correction": True, "weight_decay": 0.1}),
    "AdaTAMW": (torsion.AdaTAMW, {"max_grad_norm": 1.0}),
}


def check(device: str) -> int:
    failures = 0
    for dtype in TOLERANCE:
        for name, (cls, options) in CASES.items():
            for stochastic in (False, True) if dtype in (torch.bfloat16, torch.float16) else (False,):
                chosen = {"lr": 0.05, **options, "stochastic_rounding": stochastic}
                ours, cpu = Run(cls, dtype, device, **chosen), Run(cls, dtype, "cpu", **chosen)
                ours.steps(3)
                cpu.steps(3)
                title = f"{name} {str(dtype).removeprefix('torch.')}{' stochastic' if stochastic else ''}"
                failures += not compare(title, ours, cpu)
    failures += not skipped(device)
    # Without the caching allocator, as memcheck wants it, nothing can be captured.
    if device == "cuda" and os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING") != "1":
        failures += not captured(moved=False)
        failures += not captured(moved=True)
    print(f"{failures} failed")
    return min(failures, 1)


def skipped(device: str) -> bool:
    """A NaN leaves every bit as it was."""
    run = Run(torsion.TAM, torch.float32, device, lr=0.05)
    run.steps(2)
    before = [p.detach().clone() for p in run.params]
    run.gradients(9)
    assert run.params[3].grad is not None
    run.params[3].grad[5] = float("nan")
    run.optimizer.step()
    good = all(torch.equal(a, b) for a, b in zip(before, run.params, strict=True))
    good = good and int(run.optimizer.skipped_steps()) == 1
    print(f"{'ok' if good else 'FAILED':6} NaN skips the step")
    return good


def captured(moved: bool) -> bool:
    """Two replays and an eager step equal three eager steps. moved: the capture meets gradients at new addresses."""
    eager, graphed = (Run(torsion.AdaTAMW, torch.float32, "cuda", lr=torch.tensor(0.05)) for _ in range(2))
    eager.steps(6)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        graphed.steps(3)
    torch.cuda.current_stream().wait_stream(side)
    if moved:
        for p in graphed.params:
            p.grad = torch.zeros_like(p)
    static = [p.grad for p in graphed.params]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        graphed.optimizer.step()
    for seed in (4, 5):
        graphed.gradients(seed)
        graph.replay()
    # Then a step at other addresses still, and the graph once more without effect on them: a zero rate of change.
    for p in graphed.params:
        p.grad = None
    graphed.gradients(6)
    graphed.optimizer.step()
    good = compare(f"graph, gradients {'moved' if moved else 'in place'}", graphed, eager)
    for grad, value in zip(static, tensors(torch.float32, "cuda", 7), strict=True):
        grad.copy_(value)
    graph.replay()
    eager.gradients(7)
    eager.optimizer.step()
    return compare("and replayed after an eager step", graphed, eager) and good


def traffic(name: str) -> int:
    from torsion.cli.bench.lists import LISTS

    params = [torch.randn(s, device="cuda").mul_(0.02).requires_grad_() for s in LISTS[name].shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    for optimizer in (torch.optim.SGD(params, 1e-3, momentum=0.9, fused=True), torsion.TAM(params, 1e-3)):
        for _ in range(2):
            optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


def ratio(path: str) -> int:
    with open(path) as file:
        lines = [line for line in file if line.startswith('"')]
    size = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
    total = {"TAM": 0.0, "SGD": 0.0}
    for row in csv.DictReader(lines):
        if row["Metric Name"].startswith("dram__bytes"):
            value = float(row["Metric Value"].replace(",", "")) * size[row["Metric Unit"]]
            total["TAM" if "torsion" in row["Kernel Name"] else "SGD"] += value
    found = total["TAM"] / total["SGD"] if total["SGD"] else float("nan")
    print(json.dumps({"dram_bytes": total, "ratio": found, "at_most": AT_MOST}))
    return 0 if found <= AT_MOST else 1


def main() -> int:
    match sys.argv[1:]:
        case ["check"]:
            return check("cuda")
        case ["check", device]:
            return check(device)
        case ["traffic", name]:
            return traffic(name)
        case ["ratio", path]:
            return ratio(path)
    print(__doc__, file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
