"""One optimizer step as the ops take it: lists of tensors, their scopes and groups, scalars that stay on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

COMMON_HYPER = ("lr", "weight_decay", "decoupled", "maximize", "stochastic", "seed")
"""Columns of ``hyper`` that every rule has; a rule appends its own. Flags are 0 or 1; lr NaN: the next of ``lrs``."""

SHARED = ("correlation", "cosine", "damping")
"""Columns of ``shared``: the smoothed cosine s^, the last cosine s, and (1 + s^) / 2."""

SUMS = ("mg", "gg", "mm")
"""Columns of the sums: <m, g>, |g|^2, |m|^2, in float64."""

STATUS = ("skipped", "grad_norm", "skip", "clip")
"""``status`` is int64[4]; ``grad_norm`` and ``clip`` are the bits of a float64, so that one tensor holds all four."""


@dataclass
class Step:
    """The arguments of one step over n tensors of one device, in G groups and S scopes.

    Attributes:
        params: n tensors, float32, float64, bfloat16 or float16, dense (no holes, no overlap).
        grads: n tensors with the dtype, sizes and strides of their parameter; still multiplied by ``grad_scale``.
        states: one list of n tensors per state of the rule, float32 (float64 for float64 parameters).
        shared: ``[S, 3]`` float32 or float64, see :data:`SHARED`.
        steps: ``[slots]`` float32, steps taken by each tensor of the optimizer.
        status: ``[4]`` int64, see :data:`STATUS`.
        hyper: ``[G, H]`` float64 on the CPU, see :data:`COMMON_HYPER`.
        lrs: learning rates held in tensors of one element, in the order of the groups whose lr is NaN in ``hyper``.
        scopes, groups, slots: n integers each: row of ``shared``, row of ``hyper``, index into ``steps``.
        grad_scale: one float32 number on the device; gradients are divided by it. None is 1.
        found_inf: one float32 number on the device; not 0 skips the step. None is 0.
        max_grad_norm: clip all gradients to this norm inside the step. None does not clip.
        weights: part of each tensor's sums that this process adds (sharded training). Empty is 1 for all.
        keys: number of each tensor's first element in the unsharded tensor, for its random stream. Empty is 0 for all.
    """

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    states: Sequence[Sequence[Tensor]]
    shared: Tensor
    steps: Tensor
    status: Tensor
    hyper: Tensor
    lrs: Sequence[Tensor]
    scopes: Sequence[int]
    groups: Sequence[int]
    slots: Sequence[int]
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None
    max_grad_norm: float | None = None
    weights: Sequence[float] = field(default_factory=tuple)
    keys: Sequence[int] = field(default_factory=tuple)
