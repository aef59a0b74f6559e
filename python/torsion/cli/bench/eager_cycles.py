"""Lookbehind and SAM without torsion: as they are published, as a careful user shortens them, and a judge in float64.

Each is a cycle: a generator that yields where it needs the gradients of the same minibatch at the parameters as they
stand then. These evaluate a gradient before every ascent and before every descent, 2k in all, because the published
form does; nothing here shares code with torsion's optimizers or with its reference.

Source: arXiv 2307.16704, the algorithm and the structure of the authors' implementation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Cycle", "eager_lookbehind", "eager_sam", "judged_cycle", "lean_lookbehind"]

Cycle = Callable[[], Iterator[None]]

_ETA = 0.01
_TINY = 1e-16  # added to the norm, which may be 0


def judged_cycle(
    fast: Sequence[Tensor],
    base_step: Callable[[], object],
    params: Sequence[Tensor],
    *,
    k: int,
    rho: float,
    alpha: float | None,
    asam: bool,
) -> Cycle:
    """The algorithm line by line, tensor by tensor, in the parameters' own dtype.

    Args:
        fast: the fast weights, one for each parameter, on which ``base_step`` acts with their ``grad``.
        base_step: one step of the base optimizer.
        params: hold the perturbed weights within a cycle and the slow weights outside.
        k: inner steps.
        rho: radius of one ascent.
        alpha: slow step; None for the adaptive one, tensor by tensor.
        asam: scales every tensor by ``abs(q) + 0.01``.
    """

    def ascend() -> None:
        grads = _grads(params)
        scales = [q.abs() + _ETA for q in params] if asam else []
        scaled = [t * g for t, g in zip(scales, grads, strict=True)] if asam else grads
        step = rho / (torch.stack([v.norm() for v in scaled]).norm() + _TINY).item()
        for i, q in enumerate(params):
            if asam:
                q.addcmul_(scales[i], scaled[i], value=step)
            else:
                q.add_(grads[i], alpha=step)

    @torch.no_grad()
    def cycle() -> Iterator[None]:
        slow = [p.detach().clone() for p in params]
        for f, s in zip(fast, slow, strict=True):
            f.copy_(s)
        first: list[Tensor] = []
        for i in range(k):
            yield
            ascend()
            yield
            for f, g in zip(fast, _grads(params), strict=True):
                f.grad = g
            base_step()
            if i == 0 and alpha is None:
                first = [f - s for f, s in zip(fast, slow, strict=True)]
        for j, (p, s, f) in enumerate(zip(params, slow, fast, strict=True)):
            p.copy_(s + (_adaptive(first[j], f - s) if alpha is None else alpha) * (f - s))

    return cycle


def _adaptive(first: Tensor, last: Tensor) -> float:
    norms = (first.norm() * last.norm()).item()
    cosine = 0.0 if norms == 0 else (first * last).sum().item() / norms
    return (1 + max(-1.0, min(1.0, cosine))) / 2


def _grads(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def _norm(grads: list[Tensor]) -> Tensor:
    norm: Tensor = torch.stack(torch._foreach_norm(grads)).norm()
    return norm + _TINY


def eager_lookbehind(optimizer: torch.optim.Optimizer, k: int, rho: float, alpha: float | None) -> Cycle:
    """The published form with its buffers and its copies, on list operations where it loops over parameters.

    Every ascent goes through a buffer of its own; every descent backs the perturbed weights up in new memory, loads
    the fast ones, steps, stores them and loads the backup. An adaptive ``alpha`` (None) waits for the device at every
    tensor.
    """
    params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    with torch.no_grad():
        fast, slow, kick = ([p.clone() for p in params] for _ in range(3))

    def ascend() -> None:
        torch._foreach_copy_(kick, _grads(params))
        torch._foreach_mul_(kick, rho / _norm(_grads(params)))
        torch._foreach_add_(params, kick)

    def descend(backup: list[Tensor]) -> None:
        torch._foreach_copy_(backup, params)
        torch._foreach_copy_(params, fast)
        optimizer.step()
        torch._foreach_copy_(fast, params)

    @torch.no_grad()
    def cycle() -> Iterator[None]:
        first: list[Tensor] = []
        for i in range(k):
            yield
            ascend()
            yield
            backup = [torch.zeros_like(p) for p in params]
            descend(backup)
            if i == 0 and alpha is None:
                first = [torch.zeros_like(f) for f in fast]
                torch._foreach_copy_(first, fast)
            torch._foreach_copy_(params, backup)
        torch._foreach_copy_(params, fast)
        if alpha is None:
            _blend_adaptively(params, slow, first)
        else:
            torch._foreach_mul_(params, alpha)
            torch._foreach_add_(params, slow, alpha=1 - alpha)
        torch._foreach_copy_(fast, params)
        torch._foreach_copy_(slow, params)

    return cycle


def _blend_adaptively(params: list[Tensor], slow: list[Tensor], first: list[Tensor]) -> None:
    for p, s, f in zip(params, slow, first, strict=True):
        cosine = torch.cosine_similarity((f - s).flatten(), (p - s).flatten(), dim=0)
        alpha = ((cosine + 1) / 2).item()
        p.mul_(alpha).add_(s, alpha=1 - alpha)


def lean_lookbehind(optimizer: torch.optim.Optimizer, k: int, rho: float, alpha: float) -> Cycle:
    """The same with a fused base step and without the buffers and fills that can be done without."""
    params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
    with torch.no_grad():
        fast, slow, perturbed = ([p.clone() for p in params] for _ in range(3))

    @torch.no_grad()
    def cycle() -> Iterator[None]:
        torch._foreach_copy_(slow, params)
        torch._foreach_copy_(fast, params)
        for i in range(k):
            yield
            _kick(params, _grads(params), rho)
            yield
            if i + 1 < k:
                torch._foreach_copy_(perturbed, params)
            torch._foreach_copy_(params, fast)
            optimizer.step()
            if i + 1 < k:
                torch._foreach_copy_(fast, params)
                torch._foreach_copy_(params, perturbed)
        torch._foreach_lerp_(params, slow, 1 - alpha)

    return cycle


def _kick(params: list[Tensor], grads: list[Tensor], rho: float) -> None:
    scale: Any = rho / _norm(grads)
    if scale.device.type == "cpu":
        torch._foreach_add_(params, grads, alpha=scale.item())  # nothing to wait for on the CPU
    else:
        torch._foreach_add_(params, torch._foreach_mul(grads, scale))


def eager_sam(optimizer: torch.optim.Optimizer, rho: float) -> Cycle:
    """SAM as packages write it: the weights are cloned at every ascent and copied back before the base steps."""
    params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]

    @torch.no_grad()
    def cycle() -> Iterator[None]:
        yield
        scale = rho / (torch.stack([g.norm() for g in _grads(params)]).norm() + _TINY)
        slow = [p.clone() for p in params]
        for p, g in zip(params, _grads(params), strict=True):
            p.add_(g * scale)
        yield
        for p, s in zip(params, slow, strict=True):
            p.copy_(s)
        optimizer.step()

    return cycle
