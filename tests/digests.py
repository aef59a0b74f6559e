"""Digests of short runs over every storage type, for bitwise comparisons between processes: ``python digests.py``."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch

import torsion
from torsion.optim._perturbation import NoiseRows, Perturbation

KINDS = {
    "float32": (torch.float32, {}),
    "float64": (torch.float64, {}),
    "bfloat16": (torch.bfloat16, {}),
    "float16": (torch.float16, {}),
    "bfloat16-stochastic": (torch.bfloat16, {"stochastic_rounding": True}),
    "float16-stochastic": (torch.float16, {"stochastic_rounding": True}),
}
METHODS = {
    "TAM": (torsion.TAM, {"lr": 0.1, "weight_decay": 0.1}),
    "AdaTAM": (torsion.AdaTAM, {"lr": 0.01, "weight_decay": 0.1, "bias_correction": True}),
    "AdaTAMW": (torsion.AdaTAMW, {"lr": 0.01}),
}
# Vectors of 4 to 16 lanes with every kind of rest, and more chunks than there will be threads.
SHAPES = [(7,), (3, 5, 11), (), (1030,), (5 * 16384 + 3,), (2 * 16384 + 5,)]


def build(method: str, kind: str, **keywords: Any) -> Any:
    """The optimizer of a run, with its parameters; torch's seed decides values and stochastic rounding."""
    cls, settings = METHODS[method]
    dtype, more = KINDS[kind]
    torch.manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in SHAPES]
    return cls(params, **{**settings, "max_grad_norm": 50.0, **more, **keywords})


def advance(optimizer: Any, first: int, last: int) -> None:
    """Steps ``first`` to ``last`` - 1, each with gradients of its own."""
    for t in range(first, last):
        generator = torch.Generator().manual_seed(t)
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.randn(p.shape, generator=generator).to(p.device, p.dtype)
        optimizer.step()


def digest(optimizer: Any) -> str:
    """A hash of the bits of parameters, state and reports."""
    h = hashlib.sha256()
    for p in optimizer.param_groups[0]["params"]:
        for t in (p.detach(), *optimizer.state[p].values()):
            h.update(t.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    for t in (optimizer.cosine()["global"], optimizer.damping()["global"], optimizer.grad_norm()):
        h.update(t.cpu().double().numpy().tobytes())
    return h.hexdigest()


def perturbed(method: str, kind: str) -> Any:
    """The optimizer with DemP's lasso on one tensor, noise on all of another and on live rows of two.

    One of these was cut: its rows are short runs, through whole chunks.
    """
    optimizer = build(method, kind)
    params = optimizer.param_groups[0]["params"]
    live = torch.tensor([1, 0, 1], dtype=torch.uint8)
    each = torch.arange(params[5].numel())
    noise = {
        params[1]: NoiseRows(55, live, None, 1),
        params[4]: NoiseRows(params[4].numel(), None, None, 4),
        params[5]: NoiseRows(1, (each % 97 > 2).to(torch.uint8), each + each // 700, 5),
    }
    optimizer._perturb(Perturbation({params[3]}, noise, 5, lasso=0.1, sigma=0.01, step=2))
    return optimizer


def adaptive(base: str) -> str:
    """A hash of the weights after two outer steps whose last descent sums for the interpolation."""
    torch.manual_seed(3)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    made = torch.optim.SGD(params, lr=0.1, momentum=0.9) if base == "SGD" else torsion.AdaTAMW(params, lr=0.01)
    optimizer = torsion.Lookbehind(made, k=3, alpha="adaptive")
    for t in range(8):
        generator = torch.Generator().manual_seed(t)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.descent_step() if t % 4 else optimizer.ascent_step()
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in params)).hexdigest()


def all_digests() -> dict[str, str]:
    """A digest for each method and storage type, of steps with DemP, and of adaptive outer steps."""
    found = {f"Lookbehind({base})": adaptive(base) for base in ("SGD", "AdaTAMW")}
    for method in ("TAM", "AdaTAMW"):
        for kind in ("float32", "float64", "bfloat16-stochastic"):
            optimizer = perturbed(method, kind)
            advance(optimizer, 0, 3)
            found[f"{method} {kind} with DemP"] = digest(optimizer)
    for method in METHODS:
        for kind in KINDS:
            optimizer = build(method, kind)
            advance(optimizer, 0, 3)
            found[f"{method} {kind}"] = digest(optimizer)
    return found


if __name__ == "__main__":
    runs = {}
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        runs[threads] = all_digests()
    print(json.dumps(runs))
