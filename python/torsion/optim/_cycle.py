"""What Lookbehind and the two ways to run its outer step have in common: settings, the phases, names of parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.optim import Optimizer


@dataclass(frozen=True)
class Settings:
    """The constructor's values, checked."""

    k: int
    rho: float
    alpha: float | str  # a number, or "adaptive"
    asam: bool
    eta: float
    alpha_scope: str
    reuse_gradients: bool
    backend: str | None

    @property
    def keeps_first(self) -> bool:
        """Whether the fast weights after the first descent need a buffer; with k = 2 they still are in the fast one."""
        return self.alpha == "adaptive" and self.k >= 3


class Cycle(ABC):
    """The phases of an outer step, on the parameters of a base optimizer. Lookbehind sees to their order.

    A phase checks everything before it writes anything, reads ``p.grad`` and leaves it alone. A gradient that is not
    finite, or a ``found_inf`` that is not 0, abandons the outer step: the parameters are the slow weights again, and
    the phases that remain do nothing.
    """

    fused: ClassVar[bool]

    why: str = ""
    """In one phrase, why this path was chosen."""

    def __init__(self, base: Optimizer, settings: Settings) -> None:
        """Nothing is allocated before the first phase."""
        self.base = base
        self.settings = settings

    @abstractmethod
    def ascend(self, *, opens: bool, found_inf: Tensor | None) -> None:
        """One ascent from where the parameters are; with ``opens``, take them as the slow weights first."""

    @abstractmethod
    def descend(self, i: int, *, ascends: bool, last: bool, found_inf: Tensor | None) -> None:
        """Descent i of 1..k; ``ascends``: with the next ascent on the same gradient; ``last``: then interpolate."""

    @abstractmethod
    def abandon(self) -> None:
        """Put the slow weights into the parameters."""

    @abstractmethod
    def show_slow(self) -> None:
        """Exchange the parameters with the slow weights."""

    @abstractmethod
    def hide_slow(self) -> None:
        """Exchange them back."""

    @abstractmethod
    def skipped(self) -> Tensor:
        """Outer steps abandoned for a gradient that was not finite: 0-dim int64 on the device."""


def parameters(base: Optimizer) -> Iterator[tuple[str, dict[str, Any], int, Tensor]]:
    """(name for messages, group, position in the group, parameter) of every parameter, in order."""
    for g, group in enumerate(base.param_groups):
        names = group.get("param_names")
        for i, p in enumerate(group["params"]):
            yield (str(names[i]) if names else f"parameter {i} of group {g}"), group, i, p


def asam_scaled(group: dict[str, Any], i: int, p: Tensor) -> bool:
    """Whether ASAM scales parameter i of ``group`` by |w| + eta.

    The group's ``asam_scaled`` decides; without it the authors' rule, "weight" in the name; without names, tensors of
    two or more dimensions.
    """
    choice = group.get("asam_scaled")
    if choice is not None:
        return bool(choice)
    names = group.get("param_names")
    return "weight" in names[i] if names else p.dim() >= 2
