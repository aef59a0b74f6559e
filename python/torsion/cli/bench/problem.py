"""Parameters and gradients to step on: the same ones for every contestant, made before any clock runs."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from torsion.cli.bench.lists import TensorList

__all__ = ["Gradients", "attach", "initial"]

_PULL = (1.0, 0.5, -0.25)
"""Shared part of a tensor's gradients in units of their noise, by position in the list."""

_CURVATURE = 1.0
"""Of the loss that cycles descend: how much a gradient changes with the parameters it is evaluated at."""


def _generator(device: torch.device, seed: int) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def initial(tensors: TensorList, device: torch.device, seed: int = 0) -> list[Tensor]:
    """Parameters as a model has them after its initialization: float32, of the order of 0.02."""
    generator = _generator(device, seed)
    return [
        torch.randn(shape, generator=generator, device=device).mul_(0.02).requires_grad_() for shape in tensors.shapes
    ]


def attach(params: list[Tensor], grads: list[Tensor]) -> None:
    """Hand every parameter its gradient."""
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad


class Gradients:
    """Two batches' worth of gradients that share a direction, shown in turn in the same tensors.

    Independent noise would leave the cosine at 0, where a contestant that never computed it would pass the gate; the
    shared part differs between tensors so that one cosine for all is not the same as one for each.

    Attributes:
        live: float32 tensors, the gradients of the moment.
        spare: the same values in other tensors, for a contestant whose gradients move from step to step.
    """

    def __init__(self, tensors: TensorList, device: torch.device, seed: int = 1) -> None:
        generator = _generator(device, seed)
        self._pool: list[list[Tensor]] = [[], []]
        for i, shape in enumerate(tensors.shapes):
            shared = torch.randn(shape, generator=generator, device=device).mul_(_PULL[i % len(_PULL)])
            for batch in self._pool:
                batch.append(torch.randn(shape, generator=generator, device=device).add_(shared))
        self.live = [g.clone() for g in self._pool[0]]
        self._spare: list[Tensor] = []
        self._shown = self._pool[0]

    @property
    def spare(self) -> list[Tensor]:
        """A second set, made when first asked for."""
        if not self._spare:
            self._spare = [g.clone() for g in self.live]
        return self._spare

    @torch.no_grad()
    def refresh(self, index: int) -> None:
        """Show batch ``index``; also undoes what clipping in place did to the last one."""
        self._shown = self._pool[index % 2]
        for shown in (self.live, self._spare):
            if shown:
                torch._foreach_copy_(shown, self._shown)

    def backward(self, params: list[Tensor], *sets: list[Tensor]) -> Callable[[], None]:
        """Return what stands in for a backward pass: the batch's gradients at the parameters' present values.

        They change with the parameters, because otherwise a cycle that never ascends would pass the gate.

        Args:
            params: get their ``grad``.
            sets: tensors for the gradients, of the parameters' dtype; several are taken in turn.
        """
        turns = itertools.cycle(sets)

        @torch.no_grad()
        def evaluate() -> None:
            grads = next(turns)
            torch._foreach_copy_(grads, self._shown)
            torch._foreach_add_(grads, params, alpha=_CURVATURE)
            attach(params, grads)

        return evaluate
