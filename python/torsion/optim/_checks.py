"""Checks of constructor arguments, groups, gradients and checkpoints. Each message names what, its value and the remedy."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

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
        if value.numel() != 1 or value.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{where}lr: a tensor must hold one float32 or float64 number, got {tuple(value.shape)} {value.dtype}"
            )
        return
    at_least_zero(where, "lr", value)


def word(where: str, name: str, value: object, allowed: Iterable[str]) -> None:
    """Raise unless ``value`` is one of the ``allowed`` words."""
    if value not in allowed:
        raise ValueError(f"{where}{name}={value!r}: must be one of {', '.join(map(repr, allowed))}")


def clip_norm(where: str, value: object) -> None:
    """Raise unless ``value`` is None or a number > 0."""
    if value is None:
        return
    if not _number(where, "max_grad_norm", value) > 0:
        raise ValueError(f"{where}max_grad_norm={value!r}: must be > 0, or None for no clipping")


def seed(where: str, value: object) -> None:
    """Raise unless ``value`` is None or an integer that a float64 holds exactly."""
    if value is not None and not (isinstance(value, int) and 0 <= value < 2**53):
        raise ValueError(f"{where}sr_seed={value!r}: must be an integer in [0, 2^53)")


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
        raise TypeError(f"{name}: grad is {grad.dtype} and the parameter {p.dtype}; cast the gradient, it would lose digits")


def agree(groups: list[dict[str, Any]], names: Iterable[str], why: str) -> None:
    """Raise ValueError unless the groups agree on each of ``names``."""
    for name in names:
        for i, group in enumerate(groups[1:], 1):
            if group[name] != groups[0][name]:
                raise ValueError(
                    f"group {i}: {name}={group[name]!r}, group 0 has {groups[0][name]!r}; {why}, so give all groups one value"
                )
