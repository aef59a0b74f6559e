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
"""``status`` is int64[4]: ``skip`` is 0 or 1, in later passes of an outer step also 2; ``grad_norm`` and ``clip`` are
the bits of a float64, so that one tensor holds all four."""


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


@dataclass
class Phase(Step):
    """One pass of a Lookbehind cycle over n tensors; ``csrc/rules/lookbehind.h`` has the rules.

    An ascent has neither ``states`` nor ``source`` and ``target``; the rest is as in :class:`Step`. ``steps`` counts
    the base's steps. A pass that is skipped gives the parameters the slow weights.

    Attributes:
        rule: name of the pass and of the base: "opening_ascent", "ascent", "descent_ascent/<base>", "descent/<base>",
            "descent_blend/<base>", "blend", "blend/adaptive"; with "/asam" behind an ascent that is scaled.
        source: n tensors, float32 (float64 for float64 parameters) as all below: fast weights before the descent;
            for a blend those after the last.
        target: n tensors that receive the fast weights; may be those of ``source``.
        slow: n tensors; the opening ascent writes them, the others read.
        first: n tensors, the fast weights after the first descent, for an adaptive blend.
        perturbed: n tensors; those of ``params`` themselves where these have the state's dtype, else ``params`` are
            their rounded copies.
        scaled: whether ASAM scales each tensor.
        opens: the first pass of an outer step. The others do nothing once it is skipped (``status[2]`` is then 2).
    """

    rule: str = ""
    source: Sequence[Tensor] = ()
    target: Sequence[Tensor] = ()
    slow: Sequence[Tensor] = ()
    first: Sequence[Tensor] = ()
    perturbed: Sequence[Tensor] = ()
    scaled: Sequence[bool] = ()
    opens: bool = True

    @property
    def pass_name(self) -> str:
        """The first part of ``rule``."""
        return self.rule.partition("/")[0]
