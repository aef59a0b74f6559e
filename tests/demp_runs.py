"""What the tests of DemP share: small networks with normalizations, units killed on purpose, runs of a few steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

import torsion

INPUTS, CLASSES = 6, 3


def mlp(seed: int = 0, dtype: torch.dtype = torch.float64, widths: tuple[int, ...] = (8, 6)) -> nn.Sequential:
    """Linear, BatchNorm, ReLU for each width, then logits. Modules 0, 3, ... are the layers whose units die."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in zip((INPUTS, *widths), widths, strict=False):
        layers += [nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()]
        nn.init.ones_(layers[-2].bias)  # so that none is dead by chance
    return nn.Sequential(*layers, nn.Linear(widths[-1], CLASSES)).to(dtype)


def kill(model: nn.Sequential, layer: int, *units: int) -> None:
    """Make units of the Linear at ``layer`` silent whatever the input: scale 0 and shift -5 before the ReLU."""
    norm = model[layer + 1]
    with torch.no_grad():
        norm.weight[list(units)] = 0.0
        norm.bias[list(units)] = -5.0  # far enough for stale momentum not to revive it


def revive(model: nn.Sequential, layer: int, *units: int) -> None:
    """Undo :func:`kill` for the units that are there now."""
    norm = model[layer + 1]
    with torch.no_grad():
        norm.weight[list(units)] = 1.0
        norm.bias[list(units)] = 1.0


def inputs(step: int = 0, n: int = 16, dtype: torch.dtype = torch.float64) -> Tensor:
    """Inputs that are a function of ``step`` alone and leave torch's generator as it is."""
    return torch.randn(n, INPUTS, generator=torch.Generator().manual_seed(1000 + step)).to(dtype)


def backward(model: nn.Module, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Zero the gradients and backpropagate the loss of one batch."""
    model.zero_grad()
    x = inputs(step, dtype=dtype)
    loss = nn.functional.cross_entropy(model(x), (x.sum(1) > 0).long())
    loss.backward()
    return loss


def advance(model: nn.Module, optimizer: Any, steps: range, demp: torsion.DemP | None = None) -> list[Any]:
    """Train; the reports of the windows that were due."""
    dtype = next(model.parameters()).dtype
    reports = []
    for step in steps:
        backward(model, step, dtype)
        optimizer.step()
        if demp is not None:
            reports.append(demp.step(lambda: windows(dtype)))
    return [r for r in reports if r is not None]


def windows(dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
    """Endless window batches, the same each time."""
    step = 0
    while True:
        yield inputs(5000 + step, 32, dtype)
        step += 1


def demp_of(model: nn.Module, optimizer: Any, **settings: Any) -> torsion.DemP:
    """A DemP that cuts every 4 steps unless told otherwise."""
    given = {"total_steps": 20, "prune_every": 4, "window": 2, "lasso": 1e-2, "noise_std": 1e-2, **settings}
    dtype = next(model.parameters()).dtype
    return torsion.DemP(model, optimizer, inputs(dtype=dtype), **given)


def adamw(model: nn.Module, **settings: Any) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), **{"lr": 5e-3, "weight_decay": 5e-4, **settings})


def everything(model: nn.Module, optimizer: Any = None) -> dict[str, Any]:
    """Copies of all that a failed call must leave as it was."""
    taken: dict[str, Any] = {
        "model": {k: v.detach().clone() for k, v in model.state_dict().items()},
        "parameters": [id(p) for p in model.parameters()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "rng": torch.get_rng_state(),
    }
    if optimizer is not None:
        taken["optimizer"] = copy.deepcopy(optimizer.state_dict())
        taken["step hooks"] = (
            len(optimizer._optimizer_step_pre_hooks),
            len(optimizer._optimizer_step_post_hooks),
        )
    return taken


def same(a: Any, b: Any) -> bool:
    """Whether two of what :func:`everything` returns are equal bit for bit."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def unchanged(model: nn.Module, optimizer: Any, call: Callable[[], Any]) -> None:
    """Run ``call``, which raises, and assert that nothing changed; the error passes through."""
    before = everything(model, optimizer)
    try:
        call()
    finally:
        assert same(everything(model, optimizer), before), "something changed"


def given_noise(monkeypatch: Any, values: dict[int, Tensor]) -> None:
    """In place of random numbers, those of ``values`` by tensor id."""
    from torsion.prune import _noise

    def update_(params, row_live, col_live, rows, cols, orig_cols, sigma, seed, step, tensor_ids):
        for p, row, tensor_id in zip(params, row_live, tensor_ids, strict=True):
            noise = sigma * values[tensor_id]
            if row is not None:
                noise = noise * row.reshape(-1, *[1] * (p.dim() - 1))
            p.add_(noise)

    monkeypatch.setattr(_noise, "demp_update_", update_)
