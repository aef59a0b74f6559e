"""Few, small runs that reach every CUDA kernel: what scripts/gpu_check.sh gives to compute-sanitizer and to ncu.

python scripts/gpu_subset.py check             steps and cycles on the GPU against the CPU, eager and in a graph
python scripts/gpu_subset.py traffic LIST      one step of TAM and of SGD fused, one cycle, between profiler marks
python scripts/gpu_subset.py ratio CSV         their DRAM bytes from ncu's output, as one line of JSON
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
from torsion.optim._perturbation import NoiseRows, Perturbation

SIZES = (0, 1, 7, 333, 16384, 50001)
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Relative to the largest element: the order of sums moves a coefficient by its last bit, a rounding by one place."""
AT_MOST = {"TAM": 1.42, "Lookbehind": 8.93}
"""DRAM bytes over those of SGD with momentum; the equations ask for 28 / 20 and, at k = 5, for 176 / 20."""


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


class Cycles(Run):
    """Lookbehind over a base; a step is a whole outer step, with a gradient for each phase."""

    def __init__(self, cls: Any, dtype: torch.dtype, device: str, base: dict[str, Any], **settings: Any) -> None:
        super().__init__(cls, dtype, device, **base)
        self.optimizer = torsion.Lookbehind(self.optimizer, rho=0.5, **settings)
        k, reuse = settings.get("k", 2), settings.get("reuse_gradients", True)
        ascend, descend = self.optimizer.ascent_step, self.optimizer.descent_step
        self.phases = [ascend, *[descend] * k] if reuse else [ascend, descend] * k

    def outer_step(self, seed: int, spoiled: int = -1) -> None:
        """``spoiled``: the phase whose gradient has a NaN."""
        for number, phase in enumerate(self.phases):
            self.gradients(100 * seed + number)
            if number == spoiled:
                grad = self.params[3].grad
                assert grad is not None
                grad[5] = float("nan")
            phase()

    def steps(self, count: int) -> None:
        for seed in range(1, count + 1):
            self.outer_step(seed)


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

BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {}),
    "SGD nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1, "tensor_lr": True}),
    "Adam": (torch.optim.Adam, {"maximize": True}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.1}),
    "TAM": (torsion.TAM, {"init": "clone", "scope": "tensor", "max_grad_norm": 1.0}),
    "AdaTAMW": (torsion.AdaTAMW, {"bias_correction": True}),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "k=2": {},
    "k=2 fresh gradients": {"reuse_gradients": False},
    "k=2 ASAM fresh gradients": {"reuse_gradients": False, "asam": True},
    "k=3 ASAM adaptive": {"k": 3, "asam": True, "alpha": "adaptive"},
}


def check_cycles(device: str) -> int:
    """Every kernel of a cycle: all settings with the first base, those with a kernel of their own with the others."""
    failures = 0
    for dtype in TOLERANCE:
        for name, (cls, options) in BASES.items():
            own = [s for s in SETTINGS if name == "SGD" or "fresh" not in s]
            rounds = dtype in (torch.bfloat16, torch.float16) and cls.__module__.startswith("torsion")
            for setting, stochastic in [(s, r) for s in own for r in (False, True) if rounds or not r]:
                base = {"lr": 0.05, **options, **({"stochastic_rounding": True} if stochastic else {})}
                ours, cpu = (Cycles(cls, dtype, d, base, **SETTINGS[setting]) for d in (device, "cpu"))
                ours.steps(2)
                cpu.steps(2)
                title = f"Lookbehind({name}) {setting} {str(dtype).removeprefix('torch.')}"
                failures += not compare(f"{title}{' stochastic' if stochastic else ''}", ours, cpu)
    return failures + sum(not skipped_cycle(device, dtype, phase) for dtype in TOLERANCE for phase in range(4))


def skipped_cycle(device: str, dtype: torch.dtype, phase: int) -> bool:
    """A NaN in any phase brings the weights back, bit for bit, and counts once; the next outer step goes through."""
    base = {"lr": 0.05, "momentum": 0.9}
    run = Cycles(torch.optim.SGD, dtype, device, base, k=3, asam=True, alpha="adaptive")
    run.steps(1)
    before = [p.detach().clone() for p in run.params]
    run.outer_step(2, spoiled=phase)
    good = all(torch.equal(a, b) for a, b in zip(before, run.params, strict=True))
    run.outer_step(3)
    good = good and not torch.equal(before[-1], run.params[-1]) and int(run.optimizer.skipped_steps()) == 1
    print(f"{'ok' if good else 'FAILED':6} NaN in phase {phase} skips the cycle, {str(dtype).removeprefix('torch.')}")
    return good


class Perturbed(Run):
    """Steps with DemP's lasso on every second tensor, and noise: on whole tensors, live rows, and rows of a cut one."""

    def __init__(self, cls: Any, dtype: torch.dtype, device: str, **options: Any) -> None:
        super().__init__(cls, dtype, device, **options)
        maps = {}
        for number, p in enumerate(self.params):
            if p.numel() == 0 or number == 1:
                continue
            columns = next(c for c in (5, 3, 1) if p.numel() % c == 0)
            rows = p.numel() // columns
            live = (torch.arange(rows, device=device) % 3 != 1).to(torch.uint8) if number % 3 else None
            kept = torch.arange(rows, device=device) * 2 if number % 2 else None
            maps[p] = NoiseRows(columns, live, kept, number)
        self.perturbation = Perturbation(set(self.params[::2]), maps, seed=7, lasso=0.01, sigma=0.05)
        self.optimizer._perturb(self.perturbation)

    def steps(self, count: int) -> None:
        for seed in range(1, count + 1):
            self.perturbation.step = seed
            self.gradients(seed)
            self.optimizer.step()


def check_demp(device: str) -> int:
    """Steps with lasso and noise, then the ops of their own."""
    failures = 0
    for dtype in TOLERANCE:
        for name, cls in (("TAM", torsion.TAM), ("AdaTAMW", torsion.AdaTAMW)):
            chosen = {"lr": 0.05, "stochastic_rounding": dtype in (torch.bfloat16, torch.float16)}
            ours, cpu = (Perturbed(cls, dtype, d, **chosen) for d in (device, "cpu"))
            ours.steps(3)
            cpu.steps(3)
            failures += not compare(f"{name} lasso and noise {str(dtype).removeprefix('torch.')}", ours, cpu)
        for shape in ((7,), (3, 16385)):
            ours, cpu = (torsion.ops.philox_normal(shape, 3, 5, 9, dtype, device=d).cpu() for d in (device, "cpu"))
            failures += not verdict(f"philox_normal {shape} {dtype}", torch.equal(ours, cpu))
        failures += not verdict(f"active_flags_ {dtype}", same_flags(dtype, device))
    return failures


def same_flags(dtype: torch.dtype, device: str) -> bool:
    """Flags of a GPU and of the CPU, in both layouts, with dead channels and a NaN."""
    y = torch.randn(6, 37, 9, 5).relu().to(dtype)
    y[:, ::3] = 0
    y[2, 3, 1, 1] = torch.nan
    good = True
    for layout in (torch.contiguous_format, torch.channels_last):
        for criterion in ("ever_active", "abs_max", "sum_le"):
            found = []
            for where in (device, "cpu"):
                flags = torch.zeros(37, dtype=torch.uint8, device=where)
                count = torch.zeros(1, dtype=torch.int64, device=where)
                here = y.to(where).contiguous(memory_format=layout)
                torsion.ops.active_flags_(here, flags, count, criterion=criterion)
                found.append((flags.cpu(), int(count)))
            good = good and torch.equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]
    return good


def verdict(title: str, good: bool) -> bool:
    print(f"{'ok' if good else 'FAILED':6} {title}")
    return good


def check(device: str) -> int:
    failures = check_cycles(device) + check_demp(device)
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
        failures += not captured_cycle(moved=False)
        failures += not captured_cycle(moved=True)
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


def captured_cycle(moved: bool) -> bool:
    """A cycle with a gradient for each phase, in one replay a NaN. moved: each gradient is a tensor of its own."""
    options = {"base": {"lr": torch.tensor(0.05, device="cuda"), "momentum": 0.9}, "k": 3, "asam": True}
    eager, graphed = (Cycles(torch.optim.SGD, torch.float32, "cuda", alpha="adaptive", **options) for _ in range(2))
    static = [[torch.zeros_like(p) for p in graphed.params] for _ in graphed.phases]

    def outer_step() -> None:
        for grads, phase in zip(static, graphed.phases, strict=True):
            for p, grad in zip(graphed.params, grads, strict=True):
                if moved or p.grad is None:
                    p.grad = grad.clone()
                else:
                    p.grad.copy_(grad)
            phase()

    def fill(seed: int, spoiled: bool) -> None:
        for number, grads in enumerate(static):
            for grad, value in zip(grads, tensors(torch.float32, "cuda", 100 * seed + number), strict=True):
                grad.copy_(value)
        if spoiled:
            static[1][3][5] = float("nan")

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for seed in (1, 2):
            fill(seed, spoiled=False)
            outer_step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outer_step()
    for seed in (3, 4, 5):
        fill(seed, spoiled=seed == 4)
        graph.replay()
    for seed in range(1, 6):
        eager.outer_step(seed, spoiled=1 if seed == 4 else -1)
    good = int(graphed.optimizer.skipped_steps()) == 1
    return compare(f"cycle in a graph, gradients {'moved' if moved else 'in place'}", graphed, eager) and good


def traffic(name: str) -> int:
    from torsion.cli.bench.lists import LISTS

    params = [torch.randn(s, device="cuda").mul_(0.02).requires_grad_() for s in LISTS[name].shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    sgd, tam = torch.optim.SGD(params, 1e-3, momentum=0.9, fused=True), torsion.TAM(params, 1e-3)
    ahead = torsion.Lookbehind(torch.optim.SGD(params, 1e-3, momentum=0.9), k=5)

    def cycle() -> None:
        ahead.ascent_step()
        for _ in range(5):
            ahead.descent_step()

    for step in (sgd.step, tam.step, cycle):
        for _ in range(2):
            step()
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        step()
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


def ratio(path: str) -> int:
    with open(path) as file:
        lines = [line for line in file if line.startswith('"')]
    size = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
    total = {"TAM": 0.0, "Lookbehind": 0.0, "SGD": 0.0}
    for row in csv.DictReader(lines):
        if row["Metric Name"].startswith("dram__bytes"):
            value = float(row["Metric Value"].replace(",", "")) * size[row["Metric Unit"]]
            kernel = row["Kernel Name"]
            cycle = "Descent" in kernel or "Ascent" in kernel
            total["SGD" if "torsion" not in kernel else "Lookbehind" if cycle else "TAM"] += value
    found = {name: total[name] / total["SGD"] if total["SGD"] else float("nan") for name in AT_MOST}
    print(json.dumps({"dram_bytes": total, "ratio": found, "at_most": AT_MOST}))
    return 0 if all(found[name] <= most for name, most in AT_MOST.items()) else 1


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
