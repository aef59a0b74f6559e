"""The judge of Lookbehind and SAM: the published method in float64, with its 2k gradient evaluations and its buffers.

    f = q = s
    k times   a = gradient at q;  q = q + rho T^2 a / (|T a| + 1e-16)      T = |q| + eta on ASAM's tensors, else 1
              b = gradient at q;  f = one step of the base on f with b
    s = s + alpha (f - s)         alpha fixed, or (1 + cos(f_1 - s, f_k - s)) / 2 per tensor or over all

Nothing of torsion is used. A base is one of torch's own optimizers over float64 copies, or the judge of TAM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from judge import Judge
from torch import Tensor

Gradient = Callable[[int, Sequence[Tensor]], Sequence[Tensor | None]]
"""Number of the evaluation (0 to 2k - 1) and the weights it is taken at -> a gradient or None per tensor."""


def float64(t: Tensor) -> Tensor:
    return t.detach().cpu().double().clone()


class TorchBase:
    """One of torch's optimizers on fast weights of its own."""

    def __init__(self, cls: Any, groups: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> None:
        known = {k: v for k, v in options.items() if k not in ("foreach", "fused", "capturable")}
        copies = [{**g, "params": [torch.nn.Parameter(float64(p)) for p in g["params"]]} for g in groups]
        for g in copies:
            g.pop("param_names", None)
        self.params = [p for g in copies for p in g["params"]]
        self.optimizer = cls(copies, foreach=False, **known)

    def read(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.params]

    def write(self, values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for p, v in zip(self.params, values, strict=True):
                p.copy_(v)

    def step(self, grads: Sequence[Tensor | None]) -> None:
        for p, g in zip(self.params, grads, strict=True):
            p.grad = None if g is None else float64(g)
        self.optimizer.step()

    def states(self) -> list[dict[str, Tensor]]:
        kept = [self.optimizer.state.get(p, {}) for p in self.params]
        return [{k: v for k, v in state.items() if isinstance(v, Tensor)} for state in kept]


class TorqueBase:
    """TAM, AdaTAM or AdaTAMW: the judge of their own tests."""

    def __init__(
        self, groups: Sequence[Mapping[str, Any]], options: Mapping[str, Any], *, adaptive: bool, decoupled: bool
    ) -> None:
        known = {k: v for k, v in options.items() if k not in ("backend",)}
        if decoupled:
            known = {"weight_decay": 1e-2, **known, "decoupled_weight_decay": True}
        plain = [{k: v for k, v in g.items() if k not in ("param_names", "asam_scaled")} for g in groups]
        self.judge = Judge(plain, adaptive=adaptive, **known)
        self.adaptive = adaptive

    def read(self) -> list[Tensor]:
        return [cell.theta.clone() for cell in self.judge.cells]

    def write(self, values: Sequence[Tensor]) -> None:
        for cell, v in zip(self.judge.cells, values, strict=True):
            cell.theta = v.clone()

    def step(self, grads: Sequence[Tensor | None]) -> None:
        self.judge.step(grads)

    def states(self) -> list[dict[str, Tensor]]:
        found = []
        for cell in self.judge.cells:
            state = {"exp_avg": cell.m, "exp_avg_sq": cell.v} if self.adaptive else {"momentum_buffer": cell.m}
            numbers = {"step": cell.t, "correlation": self.judge.correlation.get(cell.scope, 0.0)}
            known = {k: torch.tensor(float(v), dtype=torch.float64) for k, v in numbers.items()}
            found.append({**state, **known} if cell.t else {})
        return found


class Published:
    """Outer steps of the published method; ``slow`` are the weights, ``trace`` the perturbed ones of the last step."""

    def __init__(
        self,
        groups: Sequence[Mapping[str, Any]],
        base: TorchBase | TorqueBase,
        *,
        maximize: bool = False,
        k: int = 2,
        rho: float = 0.05,
        alpha: float | str = 0.5,
        asam: bool = False,
        eta: float = 0.01,
        alpha_scope: str = "tensor",
    ) -> None:
        """``groups`` as the base got them; ``maximize`` of the base where a group says nothing."""
        self.base, self.k, self.rho, self.alpha, self.eta, self.alpha_scope = base, k, rho, alpha, eta, alpha_scope
        self.slow = [float64(p) for g in groups for p in g["params"]]
        self.signs = [-1.0 if g.get("maximize", maximize) else 1.0 for g in groups for _ in g["params"]]
        self.scaled = [asam and scaled for g in groups for scaled in _scaled(g)]
        self.trace: list[list[Tensor]] = []
        self.fast: list[list[Tensor]] = []
        self.alphas: list[float] = []

    def cycle(self, gradient: Gradient) -> None:
        """One outer step."""
        s, q = self.slow, [t.clone() for t in self.slow]
        self.base.write(s)
        self.trace, self.fast = [], []
        for i in range(self.k):
            q = self._ascended(q, gradient(2 * i, q))
            self.trace.append(q)
            self.base.step(gradient(2 * i + 1, q))
            self.fast.append(self.base.read())
        self.alphas = self._alphas(s)
        f = self.fast[-1]
        self.slow = [_blend(*each) for each in zip(s, f, self.alphas, strict=True)]

    def _ascended(self, q: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor]:
        scales = [
            x.abs() + self.eta if scaled else torch.ones_like(x) for x, scaled in zip(q, self.scaled, strict=True)
        ]
        known = [None if g is None else float64(g) for g in grads]
        squares = [float((t * a).square().sum()) for t, a in zip(scales, known, strict=True) if a is not None]
        length = math.sqrt(sum(squares)) + 1e-16
        return [
            x.clone() if a is None else x + self.rho * sign * t * t * a / length
            for x, sign, t, a in zip(q, self.signs, scales, known, strict=True)
        ]

    def _alphas(self, s: Sequence[Tensor]) -> list[float]:
        if self.alpha != "adaptive":
            return [float(self.alpha)] * len(s)
        first = [a - b for a, b in zip(self.fast[0], s, strict=True)]
        last = [a - b for a, b in zip(self.fast[-1], s, strict=True)]
        if self.alpha_scope == "global":
            whole = [torch.cat([t.flatten() for t in d]) for d in (first, last)]
            return [(1 + _cosine(*whole)) / 2] * len(s)
        return [(1 + _cosine(a, b)) / 2 for a, b in zip(first, last, strict=True)]


def _scaled(group: Mapping[str, Any]) -> list[bool]:
    """The author's rule where names are known, else two or more dimensions; the group may say."""
    params = list(group["params"])
    if "asam_scaled" in group:
        return [group["asam_scaled"]] * len(params)
    if "param_names" in group:
        return ["weight" in name for name in group["param_names"]]
    return [p.ndim >= 2 for p in params]


def _cosine(a: Tensor, b: Tensor) -> float:
    product = float(a.norm()) * float(b.norm())
    return 0.0 if product == 0 else max(-1.0, min(1.0, float((a * b).sum()) / product))


def _blend(s: Tensor, f: Tensor, alpha: float) -> Tensor:
    """As torch.lerp: exact at both ends and at zero displacement."""
    return s + alpha * (f - s) if alpha < 0.5 else f - (1 - alpha) * (f - s)
