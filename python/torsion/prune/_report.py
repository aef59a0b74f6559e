"""What a cut did: a table for people, and the kept indices for those who follow it."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class LayerReport:
    """Units of one layer: ``before`` the cut, ``live`` those it has now, ``cut`` those that went."""

    before: int
    live: int
    cut: int


@dataclass
class Report:
    """What a cut did.

    Attributes:
        layers: by qualified name, in forward order.
        parameters_before: elements of all parameters before the cut.
        parameters_after: and after it.
        max_difference: largest difference of any output on the inputs that were compared; 0.0 where nothing was cut
            or compared.
        kept: parameter or buffer -> {axis: int64 indices, in the tensor as it was, of what is left}; only what changed.
            Along axis 1 of a grouped convolution's weight indices are [groups, kept], within the group.
    """

    layers: dict[str, LayerReport]
    parameters_before: int
    parameters_after: int
    max_difference: float = 0.0
    kept: dict[str, dict[int, Tensor]] = field(default_factory=dict, repr=False)

    def __str__(self) -> str:
        width = max([len("parameters"), *map(len, self.layers)])
        lines = [f"{'layer':<{width}}  {'before':>12}  {'live':>12}  {'cut':>12}"]
        rows = [(name, r.before, r.live) for name, r in self.layers.items()]
        if self.layers:
            rows.append(
                ("units", sum(r.before for r in self.layers.values()), sum(r.live for r in self.layers.values()))
            )
        rows.append(("parameters", self.parameters_before, self.parameters_after))
        lines += [f"{n:<{width}}  {before:>12,}  {left:>12,}  {before - left:>12,}" for n, before, left in rows]
        return "\n".join([*lines, f"largest difference of an output: {self.max_difference:.3g}"])
