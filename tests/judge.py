"""The judge: TAM, AdaTAM and AdaTAMW in float64, from the equations, written apart from ``torsion.reference``.

    h = g + weight_decay theta (coupled) or g             g unscaled, turned round under maximize, clipped
    s = <m, g> / (|m| |g|) over the scope, 0 if either norm is 0, clamped to [-1, 1]
    s^ = decay s^ + (1 - decay) s
    m = momentum m + (eps_damping + (1 + s^) / 2) h
    TAM     theta = theta - lr m
    AdaTAM  v = beta2 v + (1 - beta2) g^2;  theta = theta - lr m / (sqrt(v / (1 - beta2^t)) + eps)

It loops over plain tensors and branches on Python numbers, as a reader of the paper would.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

DEFAULTS: dict[str, Any] = {
    "lr": 1e-3,
    "momentum": 0.9,
    "betas": (0.9, 0.999),
    "eps": 1e-8,
    "weight_decay": 0.0,
    "decoupled_weight_decay": False,
    "decay": 0.9,
    "eps_damping": 1e-8,
    "bias_correction": False,
    "maximize": False,
}


class Cell:
    """One parameter: its value, its state, the settings of its group."""

    def __init__(self, theta: Tensor, settings: Mapping[str, Any], group: int, scope: object) -> None:
        self.theta = theta.detach().cpu().double().clone()
        self.settings, self.group, self.scope = dict(settings), group, scope
        self.m, self.v = torch.zeros_like(self.theta), torch.zeros_like(self.theta)
        self.t = 0


class Judge:
    """Steps like the optimizer built with the same groups and keywords."""

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        *,
        adaptive: bool = False,
        scope: str = "global",
        init: str = "zero",
        max_grad_norm: float | None = None,
        **common: Any,
    ) -> None:
        self.adaptive, self.scope, self.init, self.max_grad_norm = adaptive, scope, init, max_grad_norm
        self.common = DEFAULTS | common
        self.cells: list[Cell] = []
        self.n_groups = 0
        for group in groups:
            self.add_group(group)
        self.s: dict[object, float] = {}
        self.correlation: dict[object, float] = {}
        self.skipped, self.grad_norm = 0, 0.0

    def add_group(self, group: Mapping[str, Any]) -> None:
        settings = self.common | {k: v for k, v in group.items() if k != "params"}
        for i, theta in enumerate(group["params"]):
            scope = {"global": "global", "group": self.n_groups, "tensor": f"{self.n_groups}.{i}"}[self.scope]
            self.cells.append(Cell(theta, settings, self.n_groups, scope))
        self.n_groups += 1

    def step(self, grads: Sequence[Tensor | None], scale: float = 1.0, found_inf: bool = False) -> None:
        """One step; a gradient per parameter in order, None for one that has none; all are divided by ``scale``."""
        signed = {
            cell: (-1 if cell.settings["maximize"] else 1) * g.detach().cpu().double() / scale
            for cell, g in zip(self.cells, grads, strict=True)
            if g is not None
        }
        if not signed:
            return
        squared = sum(float((g * g).sum()) for g in signed.values())
        momenta = sum(float((cell.m * cell.m).sum()) for cell in signed)
        if found_inf or not math.isfinite(squared) or not math.isfinite(momenta):
            self.skipped += 1
            self.grad_norm = math.nan if math.isnan(squared) else math.inf
            return
        self.grad_norm = math.sqrt(squared)
        self._turn(signed)
        clip = 1.0
        if self.max_grad_norm is not None:
            clip = min(1.0, self.max_grad_norm / (self.grad_norm + 1e-6))
        for cell, g in signed.items():
            self._move(cell, clip * g)

    def _turn(self, signed: Mapping[Cell, Tensor]) -> None:
        """Cosine and smoothed cosine of every scope that has a tensor in the step."""
        for scope in {cell.scope for cell in signed}:
            members = {cell: g for cell, g in signed.items() if cell.scope == scope}
            compared = [(cell.m, g) for cell, g in members.items() if not self._seeds(cell)]
            dot = sum(float((m * g).sum()) for m, g in compared)
            length_m = math.sqrt(sum(float((m * m).sum()) for m, _ in compared))
            length_g = math.sqrt(sum(float((g * g).sum()) for _, g in compared))
            product = length_m * length_g
            self.s[scope] = 0.0 if product == 0 else max(-1.0, min(1.0, dot / product))
            gamma = next(iter(members)).settings["decay"]
            self.correlation[scope] = gamma * self.correlation.get(scope, 0.0) + (1 - gamma) * self.s[scope]

    def _seeds(self, cell: Cell) -> bool:
        return self.init == "clone" and cell.t == 0

    def damping(self, scope: object) -> float:
        return (1 + self.correlation[scope]) / 2

    def _move(self, cell: Cell, g: Tensor) -> None:
        o = cell.settings
        lr, decay = float(o["lr"]), o["weight_decay"]
        h = g if o["decoupled_weight_decay"] else g + decay * cell.theta
        beta = o["betas"][0] if self.adaptive else o["momentum"]
        if self._seeds(cell):
            cell.m = h.clone()
        else:
            cell.m = beta * cell.m + (o["eps_damping"] + self.damping(cell.scope)) * h
        cell.t += 1
        if o["decoupled_weight_decay"]:
            cell.theta = (1 - lr * decay) * cell.theta
        if not self.adaptive:
            cell.theta = cell.theta - lr * cell.m
            return
        beta2 = o["betas"][1]
        cell.v = beta2 * cell.v + (1 - beta2) * g * g
        corrected = cell.v / (1 - beta2**cell.t) if o["bias_correction"] else cell.v
        cell.theta = cell.theta - lr * cell.m / (torch.sqrt(corrected) + o["eps"])
