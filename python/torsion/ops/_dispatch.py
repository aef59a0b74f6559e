"""Runs a :class:`Step` on a back end, and gives the dispatcher kernels where no compiled module registered any."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from torsion.ops import _backends, _native
from torsion.ops._frame import Step
from torsion.ops._rules import ADATAM, RULES, TAM, Rule


def _triton(rule: Rule) -> Any:
    return importlib.import_module(f"torsion.triton_kernels.{rule.name}")


def _reference(rule: Rule) -> Any:
    return importlib.import_module(f"torsion.reference.{rule.name}")


def reduce(rule: Rule, step: Step, backend: str) -> Tensor:
    """Sums of a split step on a Python back end: float64 ``[S + 1, 3]``."""
    with torch.no_grad():
        if backend == "triton":
            return _triton(rule).reduce(step)  # type: ignore[no-any-return]
        return getattr(_reference(rule), f"{rule.name}_sums")(step)  # type: ignore[no-any-return]


def apply_(rule: Rule, step: Step, sums: Tensor | None, backend: str) -> None:
    """The rest of a split step on a Python back end; a whole one when ``sums`` is None."""
    with torch.no_grad():
        if backend != "triton":
            getattr(_reference(rule), rule.op)(step, sums)
        elif sums is None:
            _triton(rule).step_(step)
        else:
            _triton(rule).apply_(step, sums)


def run_(rule: Rule, step: Step, backend: str | None) -> None:
    """A whole step on the back end asked for, TORSION_BACKEND's, or the best for the device.

    Raises:
        ValueError: the back end is unknown or cannot run here.
    """
    device = step.shared.device.type
    chosen = _backends.choose(device, backend)[0]
    if chosen in ("triton", "reference"):
        apply_(rule, step, None, chosen)
        torch.autograd.graph.increment_version([*step.params, *(t for s in step.states for t in s)])
        return
    getattr(torch.ops.torsion, rule.op)(
        step.params, step.grads, *step.states, step.shared, step.steps, step.status, step.hyper, step.lrs,
        step.scopes, step.groups, step.slots, step.grad_scale, step.found_inf, step.max_grad_norm,
    )  # fmt: skip
    if not torch.compiler.is_compiling():  # traced code is functionalized, which does this itself
        torch.autograd.graph.increment_version([*step.params, *(t for s in step.states for t in s)])


def _kernel(rule: Rule, backend: str) -> Callable[..., None]:
    """The list op's signature on a Python back end, for the dispatcher."""
    n_states = len(rule.states)

    def kernel(params: Sequence[Tensor], grads: Sequence[Tensor], *rest: Any) -> None:
        states, rest = rest[:n_states], rest[n_states:]
        apply_(rule, Step(params, grads, states, *rest), None, backend)

    return kernel


BEHIND_OPS = {
    "cpu": "reference" if _native.C is None else "cpu",
    "cuda": "cuda" if _native.C_cuda else "reference" if _backends.obstacle("triton", "cuda") else "triton",
}
"""Device type -> back end that ``torch.ops.torsion`` runs on."""

_library = torch.library.Library("torsion", "IMPL")
for _rule in RULES.values():
    if _native.C is None:
        _library.impl(_rule.op, _kernel(_rule, BEHIND_OPS["cpu"]), "CPU")
    if _native.C_cuda is None:
        _library.impl(_rule.op, _kernel(_rule, BEHIND_OPS["cuda"]), "CUDA")

__all__ = ["ADATAM", "BEHIND_OPS", "TAM", "apply_", "reduce", "run_"]
