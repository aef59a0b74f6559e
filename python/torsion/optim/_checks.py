"""Checks of constructor arguments, groups, gradients and state. Each message names what, its value and the remedy."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from torsion.optim import _layout, _sharding

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCOPES = ("global", "group", "tensor")
INITS = ("zero", "clone")

_UNTAKEN = {
    "foreach": "every step is already one fused pass over all tensors",
    "fused": "every step is already fused; choose an implementation with backend=",
    "capturable": "steps are always capturable: counters, scales and rates stay on the device",
    "differentiable": "the fused update has no derivative",
    "nesterov": "the method defines no Nesterov form",
    "dampening": "the cosine sets the damping",
    "amsgrad": "the method defines no AMSGrad form",
}


def reject_untaken(cls: str, kwargs: Mapping[str, object]) -> None:
    """Raise TypeError for the first of ``kwargs``, with the reason where torch's optimizers take that argument."""
    for name in kwargs:
        why = _UNTAKEN.get(name)
        raise TypeError(
            f"{cls} does not take {name}=: {why}"
            if why
            else f"{cls}() got an unexpected keyword argument {name!r}; see help(torsion.{cls})"
        )


def not_empty(cls: str, params: Any) -> Any:
    """``params`` as torch's constructor takes them; raise ValueError if there are none."""
    if isinstance(params, (Tensor, str)) or not isinstance(params, Iterable):
        return params  # torch's own error says it well
    params = list(params)
    if not params:
        raise ValueError(f"{cls}: params=[] is empty; pass model.parameters() anew (a generator runs only once)")
    return params


def _number(where: str, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{where}{name}={value!r}: must be a number")
    return float(value)


def at_least_zero(where: str, name: str, value: object) -> None:
    """Raise unless ``value`` is a finite number >= 0."""
    x = _number(where, name, value)
    if not (0 <= x < math.inf):
        raise ValueError(f"{where}{name}={value!r}: must be finite and >= 0")


def fraction(where: str, name: str, value: object, *, closed: bool) -> None:
    """Raise unless ``value`` lies in [0, 1], or in [0, 1) when not ``closed``."""
    x = _number(where, name, value)
    if not (0 <= x < 1 or (closed and x == 1)):
        raise ValueError(f"{where}{name}={value!r}: must lie in [0, 1{']' if closed else ')'}")


def rate(where: str, value: object) -> None:
    """Raise unless ``value`` is a finite number >= 0 or a floating point tensor of one element."""
    if isinstance(value, Tensor):
        if value.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"{where}lr: a tensor must be float32 or float64, got {value.dtype}; call .float() on it")
        if value.numel() != 1:
            shape = tuple(value.shape)
            raise ValueError(f"{where}lr: a tensor must hold one number, got shape {shape}; use a group per rate")
        return
    at_least_zero(where, "lr", value)


def word(where: str, name: str, value: object, allowed: Sequence[str], more: str = "") -> None:
    """Raise unless ``value`` is one of the ``allowed`` words; ``more`` ends the list of what is."""
    if value not in allowed:
        kind = ValueError if isinstance(value, str) else TypeError
        raise kind(f"{where}{name}={value!r}: must be one of {', '.join([*map(repr, allowed), *filter(None, [more])])}")


def flag(where: str, name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{where}{name}={value!r}: must be True or False")


def pair(where: str, name: str, value: object) -> tuple[object, object]:
    """``value`` as two; raise unless it is a tuple or list of two."""
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"{where}{name}={value!r}: must be a tuple of two numbers in [0, 1)")
    if len(value) != 2:
        raise ValueError(f"{where}{name}={value!r}: must be two numbers in [0, 1)")
    return value[0], value[1]


def clip_norm(where: str, value: object) -> None:
    """Raise unless ``value`` is None or a number > 0."""
    if value is None:
        return
    if not _number(where, "max_grad_norm", value) > 0:
        raise ValueError(f"{where}max_grad_norm={value!r}: must be > 0, or None for no clipping")


def seed(where: str, value: object) -> None:
    """Raise unless ``value`` is None or an integer that a float64 holds exactly."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{where}sr_seed={value!r}: must be an integer, or None to draw one")
    if not 0 <= value < 2**53:
        raise ValueError(f"{where}sr_seed={value!r}: must lie in [0, 2^53)")


def parameter(name: str, p: Tensor) -> None:
    """Raise TypeError unless the dtype of ``p`` is one the kernels know."""
    if p.dtype not in DTYPES:
        kind = "complex" if p.dtype.is_complex else "of that dtype"
        raise TypeError(
            f"{name}: parameters {kind} are not supported ({p.dtype}); use float32, float64, bfloat16 or float16"
            + (", or optimize torch.view_as_real of it" if p.dtype.is_complex else "")
        )


def gradient(name: str, p: Tensor, grad: Tensor) -> None:
    """Raise unless ``grad`` can update ``p``."""
    if grad.layout != torch.strided:
        raise RuntimeError(f"{name}: grad is sparse ({grad.layout}); call .to_dense() or give it its own optimizer")
    if grad.dtype.is_complex:
        raise TypeError(f"{name}: grad is complex ({grad.dtype}); optimize torch.view_as_real of the parameter")
    if grad.shape != p.shape:
        raise ValueError(
            f"{name}: grad has shape {tuple(grad.shape)}, the parameter {tuple(p.shape)}; "
            "call zero_grad() after changing a parameter's shape"
        )
    if grad.device != p.device:
        raise ValueError(f"{name}: grad is on {grad.device}, the parameter on {p.device}; move them together")
    if grad.dtype != p.dtype and torch.promote_types(grad.dtype, p.dtype) != p.dtype:
        raise TypeError(
            f"{name}: grad is {grad.dtype}, the parameter {p.dtype}; cast the gradient, it would lose digits"
        )
    _of_one_kind(name, p, "gradient", grad)
    local = _sharding.local(p)
    if _layout.may_overlap(local):
        raise ValueError(f"{name}: its elements share memory (strides {local.stride()}); make it .contiguous()")


def state(name: str, p: Tensor, held: Mapping[str, Any] | None, keys: Iterable[str]) -> None:
    """Raise ValueError unless the state of ``p`` is empty or has a tensor of its shape under each of ``keys``."""
    for key in keys if held else ():
        value = held.get(key)  # type: ignore[union-attr]
        if not isinstance(value, Tensor) or value.shape != p.shape:
            found = f"has shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"is {type(value).__name__}"
            raise ValueError(
                f"{name}: state {key!r} {found}, needs shape {tuple(p.shape)}; restore it or delete all state of it"
            )
        _of_one_kind(name, p, f"state {key!r}", value)


def _of_one_kind(name: str, p: Tensor, what: str, t: Tensor) -> None:
    if _sharding.is_dtensor(p) != _sharding.is_dtensor(t):
        kinds = ("DTensor", "plain tensor")
        kind_p, kind_t = kinds if _sharding.is_dtensor(p) else kinds[::-1]
        raise TypeError(f"{name}: the parameter is a {kind_p} and its {what} a {kind_t}; distribute both or neither")


def distinct(marks: Sequence[int], name: Callable[[int], str], problem: str) -> None:
    """Raise ValueError if two parameters carry one mark (an id, an address): a step would update them twice at once.

    Args:
        marks: one for each parameter.
        name: called with a position, only to word the error: names of a thousand parameters are not made in vain.
        problem: what is wrong, and the remedy.
    """
    if len(set(marks)) == len(marks):
        return
    first: dict[int, int] = {}
    for i, mark in enumerate(marks):
        if mark in first:
            raise ValueError(f"{name(i)}: {problem} (the other is {name(first[mark])})")
        first[mark] = i


def one_device_type(params: Iterable[Tensor]) -> None:
    """Raise ValueError if parameters are on the CPU and on a GPU: a step cannot wait for both without a host sync."""
    types = sorted({p.device.type for p in params})
    if len(types) > 1:
        raise ValueError(
            f"parameters are on {' and '.join(types)}; one step cannot span both, so move the model to one "
            "device or give each device type its own optimizer"
        )


def agree(g: int, group: Mapping[str, Any], first: Mapping[str, Any], names: Iterable[str], why: str) -> None:
    """Raise ValueError unless group ``g`` has the values of the first group under each of ``names`` they have."""
    for name in names:
        if name in first and group[name] != first[name]:
            raise ValueError(
                f"group {g}: {name}={group[name]!r}, group 0 has {first[name]!r}; {why}, so give all groups one value"
            )
