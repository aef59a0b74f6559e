"""Outputs before and after a cut."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torsion.prune._follow import reachable
from torsion.prune._structure import call, describe, frozen


@contextlib.contextmanager
def _exact(model: nn.Module) -> Iterator[None]:
    """Without TF32, whose rounding depends on the shapes and would drown what a cut may change."""
    if not any(p.is_cuda for p in model.parameters()):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def run(model: nn.Module, inputs: Sequence[Any]) -> list[list[Tensor]]:
    """Floating point outputs on each of ``inputs``, in evaluation mode."""
    return [_run(model, x) for x in inputs]


def _run(model: nn.Module, x: Any) -> list[Tensor]:
    # Each input on its own: a model that draws numbers draws the same for it before and after the cut.
    with frozen(model), _exact(model):
        return [t.clone() for t in reachable(call(model, x)) if t.is_floating_point()]


def difference(
    model: nn.Module, inputs: Sequence[Any], before: list[list[Tensor]], tolerance: Mapping[torch.dtype, float] | None
) -> float:
    """Largest absolute difference between the outputs now and ``before``.

    Raises:
        RuntimeError: it is more than ``tolerance`` allows, or the model no longer runs on ``inputs``.
    """
    worst = 0.0
    coarsest = max((_allowed(p, tolerance) for p in model.parameters()), default=0.0)
    for x, old in zip(inputs, before, strict=True):
        try:
            new = _run(model, x)
        except Exception as error:
            raise RuntimeError(
                f"the model with fewer units does not run on {describe(x)} ({type(error).__name__}: {error}); "
                "something in it depends on the number of units. Nothing was cut"
            ) from error
        if [t.shape for t in new] != [t.shape for t in old]:
            raise RuntimeError(
                f"outputs have shapes {[tuple(t.shape) for t in new]} with fewer units, "
                f"{[tuple(t.shape) for t in old]} "
                "before: something in the model depends on the number of units. Nothing was cut"
            )
        for a, b in zip(old, new, strict=True):
            gap = _gap(a, b)
            worst = max(worst, gap)
            finite = a[a.isfinite()]
            scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
            bound = max(coarsest, _allowed(a, tolerance)) * scale
            if tolerance is not None and not gap <= bound:
                raise RuntimeError(
                    f"the cut changes an output of {describe(x)} by {gap:.3g}, more than {bound:.3g}: a unit that "
                    "would go still acts there. Nothing was cut; observe more batches, or keep the unit"
                )
    return worst


def _allowed(t: Tensor, tolerance: Mapping[torch.dtype, float] | None) -> float:
    return (tolerance or {}).get(t.dtype, 0.0)


def _gap(a: Tensor, b: Tensor) -> float:
    """Largest difference; where both hold the same infinity or NaN there is none."""
    if not a.numel():
        return 0.0
    apart = (a.double() - b.double()).abs()
    same = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, apart.nan_to_num(nan=float("inf"))).max())
