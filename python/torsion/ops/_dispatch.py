"""Runs a :class:`Step` on a back end, and gives the dispatcher kernels where no compiled module registered any."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torsion.ops import _backends, _native
from torsion.ops._frame import Phase, Step
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


def reduce_phase(phase: Phase, backend: str) -> Tensor:
    """Sums of a pass of a Lookbehind cycle on a Python back end: float64 ``[S + 1, N]``."""
    with torch.no_grad():
        if backend == "triton":
            return importlib.import_module("torsion.triton_kernels.lookbehind").reduce(phase)  # type: ignore[no-any-return]
        return importlib.import_module("torsion.reference.lookbehind").phase_sums(phase)  # type: ignore[no-any-return]


def run_phase_(phase: Phase, sums: Tensor | None, backend: str) -> None:
    """The rest of such a pass; a whole one when ``sums`` is None."""
    with torch.no_grad():
        if backend != "triton":
            importlib.import_module("torsion.reference.lookbehind").phase_(phase, sums)
            return
        kernels = importlib.import_module("torsion.triton_kernels.lookbehind")
        if sums is None:
            kernels.step_(phase)
        else:
            kernels.apply_(phase, sums)


_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _written(step: Step) -> list[Tensor]:
    return [*step.params, *(t for s in step.states for t in s), step.shared, step.steps, step.status]


def _dense(t: Tensor) -> bool:
    places = sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1)
    spans = [1]
    for _, size in places:
        spans.append(spans[-1] * size)
    return t.numel() == 0 or [stride for stride, _ in places] == spans[:-1]


def refuse_misfits(name: str, step: Step, streams: Mapping[str, Sequence[Tensor]]) -> None:
    """What compiled code and Triton refuse by themselves, for the reference, which would broadcast it.

    Args:
        name: of the rule, for the messages.
        step: everything but the lists of tensors.
        streams: lists by name; those of parameters and gradients have the parameters' dtype, the others the state's.

    Raises:
        RuntimeError: tensors whose dtype, layout, device or number do not fit.
    """
    n = len(step.params)

    def need(good: bool, problem: str) -> None:
        if not good:
            raise RuntimeError(f"{name}: {problem}")

    for what, tensors in streams.items():
        need(len(tensors) == n, f"lists differ in length: {n} params, {len(tensors)} of {what}")
    for what, numbers, limit in (
        ("scopes", step.scopes, step.shared.shape[0]),
        ("groups", step.groups, step.hyper.shape[0]),
        ("slots", step.slots, step.steps.numel()),
    ):
        need(len(numbers) == n, f"{what} needs one entry per tensor")
        for i, x in enumerate(numbers):
            need(0 <= x < limit, f"{what}[{i}] = {x} is out of range")
    rates = int(step.hyper[:, 0].isnan().sum())
    need(rates <= len(step.lrs), f"hyper asks for {rates} learning rates, lrs holds {len(step.lrs)}")
    for i, p in enumerate(step.params):
        need(p.dtype in _DTYPES, f"params[{i}] must be float32, float64, bfloat16 or float16, is {p.dtype}")
        need(_dense(p), f"params[{i}] has holes or overlaps in memory; pass a contiguous copy")
        places = [st if size > 1 else 0 for st, size in zip(p.stride(), p.shape, strict=True)]
        for what, tensors in streams.items():
            t, where = tensors[i], f"{what}, tensor {i}"
            own_dtype = tensors is step.params or tensors is step.grads or p.dtype == torch.float64
            dtype = p.dtype if own_dtype else torch.float32
            need(t.dtype == dtype, f"{where} has the wrong dtype: {t.dtype}, not {dtype}")
            need(t.device == step.shared.device, f"{where} is on another device")
            own = [st if size > 1 else 0 for st, size in zip(t.stride(), t.shape, strict=True)]
            need(t.shape == p.shape and own == places, f"{where} differs from its parameter in sizes or strides")


def _streams(step: Step) -> dict[str, Sequence[Tensor]]:
    return {f"list {k}": tensors for k, tensors in enumerate((step.params, step.grads, *step.states))}


def run_(rule: Rule, step: Step, backend: str | None) -> None:
    """A whole step on the back end asked for, TORSION_BACKEND's, or the best for the device.

    Raises:
        ValueError: the back end is unknown or cannot run here.
        RuntimeError: tensors whose dtype, layout, device or number do not fit.
    """
    device = step.shared.device.type
    chosen = _backends.choose(device, backend)[0]
    if chosen in ("triton", "reference"):
        if chosen == "reference":
            refuse_misfits(rule.name, step, _streams(step))
        apply_(rule, step, None, chosen)
        torch.autograd.graph.increment_version(_written(step))
        return
    getattr(torch.ops.torsion, rule.op)(
        step.params, step.grads, *step.states, step.shared, step.steps, step.status, step.hyper, step.lrs,
        step.scopes, step.groups, step.slots, step.grad_scale, step.found_inf, step.max_grad_norm,
    )  # fmt: skip


def _kernel(rule: Rule, backend: str) -> Callable[..., None]:
    """The list op's signature on a Python back end, for the dispatcher."""
    n_states = len(rule.states)

    def kernel(params: Sequence[Tensor], grads: Sequence[Tensor], *rest: Any) -> None:
        states, rest = rest[:n_states], rest[n_states:]
        step = Step(params, grads, states, *rest)
        if backend == "reference":
            refuse_misfits(rule.name, step, _streams(step))
        apply_(rule, step, None, backend)

    return kernel


def _counting(rule: Rule) -> Callable[..., None]:
    """The list op, then one more on the version counters of what it wrote, which is how autograd learns of it."""
    op, n_states = getattr(torch.ops.torsion, rule.op).default, len(rule.states)

    def kernel(keyset: Any, *args: Any) -> None:
        with torch._C._AutoDispatchBelowADInplaceOrView():
            op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
        shared = 2 + n_states
        lists = [args[0], *args[2:shared]]
        torch.autograd.graph.increment_version([*(t for x in lists for t in x), *args[shared : shared + 3]])

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
    _library.impl(_rule.op, _counting(_rule), "ADInplaceOrView", with_keyset=True)

__all__ = ["ADATAM", "BEHIND_OPS", "TAM", "apply_", "reduce", "run_"]
