"""Checks of what a user gives to Lookbehind and SAM. Each message names what, its value and the remedy."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from torsion.ops import _backends
from torsion.optim import _checks
from torsion.optim._cycle import Settings

_EXAMPLE = "torsion.{cls}(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))"
_FIXED_BY_SAM = {"k": 1, "alpha": 1, "alpha_scope": "tensor", "reuse_gradients": True}


def base(cls: str, given: object, never: type) -> None:
    """Raise TypeError unless ``given`` is an optimizer, other than ``never``, that can step without a closure."""
    example = f"{cls} takes an optimizer instance, as in {_EXAMPLE.format(cls=cls)}"
    if isinstance(given, type):
        raise TypeError(f"base_optimizer={given.__name__} is a class, pass an instance; {example}")
    if not isinstance(given, Optimizer):
        raise TypeError(f"base_optimizer is {type(given).__name__}, no torch.optim.Optimizer; {example}")
    if isinstance(given, never):
        raise TypeError(
            f"base_optimizer is itself {type(given).__name__}; pass the optimizer in it, its base_optimizer, "
            "and more ascents as k="
        )
    required = [
        p.name
        for p in inspect.signature(given.step).parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if required:
        raise TypeError(
            f"base_optimizer={type(given).__name__}: its step() needs {', '.join(required)}, and a base steps from "
            "the gradients alone; use one whose step() takes no arguments, such as SGD or AdamW"
        )


def reject_untaken(cls: str, base: Optimizer, kwargs: Mapping[str, object]) -> None:
    """Raise TypeError for the first of ``kwargs``, with where the argument belongs."""
    for name in kwargs:
        if name in base.defaults:
            raise TypeError(f"{cls} does not take {name}=: it belongs to the base, {type(base).__name__}(..., {name}=)")
        if name in _FIXED_BY_SAM:
            raise TypeError(f"{cls} does not take {name}=: it is Lookbehind with {name}={_FIXED_BY_SAM[name]!r}")
        if name == "adaptive":
            raise TypeError(f"{cls} does not take adaptive=: the adaptive radius of ASAM is asam=True")
        _checks.reject_untaken(cls, {name: kwargs[name]})


def settings(given: Settings) -> None:
    """Raise unless every value is of its kind and in its range."""
    k, alpha = given.k, given.alpha
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k={k!r}: must be an integer >= 1, the number of ascents")
    if k < 1:
        raise ValueError(f"k={k!r}: must be >= 1, the number of ascents")
    _checks.at_least_zero("", "rho", given.rho)
    _checks.at_least_zero("", "eta", given.eta)
    remedy = 'must be a number in [0, 1], or "adaptive"'
    if isinstance(alpha, bool) or not isinstance(alpha, (str, numbers.Real)):
        raise TypeError(f"alpha={alpha!r}: {remedy}")
    if alpha != "adaptive" if isinstance(alpha, str) else not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r}: {remedy}")
    _checks.flag("", "asam", given.asam)
    _checks.word("", "alpha_scope", given.alpha_scope, ("tensor", "global"))
    _checks.flag("", "reuse_gradients", given.reuse_gradients)
    if given.backend is not None:
        _checks.word("", "backend", given.backend, _backends.NAMES, "or None for the best")


def group(where: str, given: Mapping[str, Any]) -> None:
    """Raise TypeError unless the group's ``asam_scaled``, if there is one, is True or False."""
    if given.get("asam_scaled") is not None:
        _checks.flag(where, "asam_scaled", given["asam_scaled"])


def found_inf(given: object) -> None:
    """Raise unless ``given`` is None or a tensor of one element."""
    if given is not None and not isinstance(given, Tensor):
        raise TypeError(f"found_inf={given!r}: must be a tensor of one element, or None")
    if isinstance(given, Tensor) and given.numel() != 1:
        raise ValueError(
            f"found_inf has shape {tuple(given.shape)}: must be one element, not 0 where any rank found one"
        )


def _phases(settings: Settings) -> tuple[list[str], list[str]]:
    """The phases before and in the loop over range(k)."""
    if settings.reuse_gradients:
        return ["ascent_step"], ["descent_step"]
    return [], ["ascent_step", "descent_step"]


def scaler_recipe(cls: str, settings: Settings) -> str:
    """What to write in place of ``scaler.step(optimizer)``."""
    before, repeated = _phases(settings)

    def lines(phases: list[str], indent: str) -> list[str]:
        backward = "optimizer.zero_grad(); scaler.scale(loss()).backward(); scaler.unscale_(optimizer)"
        return [f"{indent}{backward}; optimizer.{phase}(); scaler.update()" for phase in phases]

    return "\n".join(
        [
            f"scaler.step() cannot run an outer step of {cls}, which takes several gradients; use its phases:",
            *lines(before, "    "),
            f"    for _ in range({settings.k}):",
            *lines(repeated, "        "),
        ]
    )


def no_closure(cls: str, settings: Settings) -> str:
    """What to do where ``step()`` has no closure."""
    before, repeated = _phases(settings)
    phases = f"{before[0]}() once, then {settings.k} times " if before else f"{settings.k} times "
    return (
        f"{cls}.step() needs a closure that does zero_grad, forward and backward and returns the loss: an outer step "
        f"evaluates it several times. Without one, call after each backward: {phases}"
        f"{' and '.join(f'{phase}()' for phase in repeated)}"
    )
