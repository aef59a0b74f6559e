"""Noise on the rows of live units, after the optimizer; keyed by where an element lay in the uncut model."""

from __future__ import annotations

import math
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torsion.ops import demp_update_
from torsion.prune._coordinates import Coordinates


@dataclass(frozen=True, eq=False)
class Entry:
    """A parameter, or a stretch of its rows, as :func:`torsion.ops.demp_update_` takes it."""

    name: str
    owner: nn.Module
    attribute: str
    param: Tensor
    device: torch.device
    first: int
    last: int | None
    row_live: Tensor | None
    col_live: Tensor | None
    rows: Tensor | None
    cols: Tensor | None
    columns: int
    tensor_id: int

    def holds(self) -> bool:
        """Whether the module has this parameter still, on the same device."""
        return self.owner._parameters.get(self.attribute) is self.param and self.param.device == self.device

    @property
    def plain(self) -> bool:
        """Whether rows are whole: none of their elements were cut, none are masked on their own."""
        return self.cols is None and self.col_live is None and self.last is None

    def view(self) -> Tensor:
        """The parameter, or its stretch of rows."""
        return self.param if self.last is None else self.param[self.first : self.last]


class Noise:
    """What is to be noised, as lists for one call; made anew when masks, parameters or devices change.

    Args:
        model: the module whose parameters these are.
        coordinates: of each of its parameters, by name.
        live: per parameter, the dimension along which its rows lie and which of the units there are live (bool). None:
            every parameter that is trained, all of it.
    """

    def __init__(
        self, model: nn.Module, coordinates: Mapping[str, Coordinates], live: Mapping[str, tuple[int, Tensor]] | None
    ) -> None:
        """Look up the owners of the parameters."""
        self._coordinates = coordinates
        self._live = live
        self._owners = {}
        for prefix, module in model.named_modules():
            for attribute, p in module._parameters.items():
                name = f"{prefix}.{attribute}" if prefix else attribute
                if p is not None and name in coordinates:  # names of a shared parameter after its first are not there
                    self._owners[name] = module, attribute
        self._entries: list[Entry] | None = None
        self._trained: list[bool] = []

    def entries(self) -> list[Entry]:
        """What is to be noised, as the parameters are now."""
        if not self.holds():
            self._entries, self._trained = self._planned(), self._trains()
        return self._entries or []

    def holds(self) -> bool:
        """Whether the entries made last are still those of the model."""
        if self._entries is None or self._trained != self._trains():
            return False
        return all(e.holds() for e in self._entries)

    def _trains(self) -> list[bool]:
        parameters = (owner._parameters.get(attribute) for owner, attribute in self._owners.values())
        return [p is not None and p.requires_grad for p in parameters]

    def add_(
        self,
        sigma: float | Tensor,
        seed: int,
        step: int | Tensor,
        masks: Mapping[Tensor, Tensor] | None = None,
        but: Container[Tensor] = (),
    ) -> None:
        """Add ``sigma`` times a standard normal number to each element.

        Args:
            sigma: standard deviation; a 0-dim tensor where only the device knows it.
            seed: 64-bit key.
            step: the step t, a number or a 0-dim int64 tensor.
            masks: bool masks by parameter; elements where it is False, and parameters that have none, stay as they
                are. None: no such masks.
            but: parameters that have their noise already.
        """
        entries = [e for e in self.entries() if e.param not in but and (masks is None or e.param in masks)]
        before = {} if masks is None else {e.param: e.param.detach().clone() for e in entries}
        for device in {e.device for e in entries}:
            _update_([e for e in entries if e.device == device], sigma, seed, step)
        for p, old in before.items():
            p.copy_(torch.where(masks[p], p, old))  # type: ignore[index]

    def _planned(self) -> list[Entry]:
        entries: list[Entry] = []
        for name, (owner, attribute) in self._owners.items():
            p = owner._parameters.get(attribute)
            if p is None or not p.requires_grad or p.numel() == 0:
                continue
            if self._live is None:
                entries.append(self._entry(name, p, {}))
            elif name in self._live:
                entries.extend(self._live_entries(name, p, *self._live[name]))
        return entries

    def _live_entries(self, name: str, p: Tensor, dim: int, live: Tensor) -> list[Entry]:
        flags = live.flatten().to(p.device, torch.uint8)
        if dim == 0:
            return [self._entry(name, p, {"row_live": None if bool(live.all()) else flags})]
        # A transposed convolution: units along dimension 1, of each group of rows its own.
        groups = live.numel() // p.shape[1]
        size = p.shape[0] // groups
        spatial = math.prod(p.shape[2:])
        return [
            self._entry(
                name,
                p,
                {"col_live": flags[g * p.shape[1] : (g + 1) * p.shape[1]].repeat_interleave(spatial)},
                (g * size, (g + 1) * size, g) if groups > 1 else None,
            )
            for g in range(groups)
        ]

    def _entry(self, name: str, p: Tensor, flags: dict[str, Any], stretch: tuple[int, int, int] | None = None) -> Entry:
        owner, attribute = self._owners[name]
        place = self._coordinates[name]
        rows, cols = place.rows(), place.flat_columns()
        first, last = 0, None
        if stretch is not None:
            first, last, group = stretch
            rows = (torch.arange(p.shape[0], device="cpu") if rows is None else rows)[first:last]
            cols = cols[group] if cols is not None and cols.dim() == 2 else cols
        return Entry(
            name=name,
            owner=owner,
            attribute=attribute,
            param=p,
            device=p.device,
            first=first,
            last=last,
            row_live=flags.get("row_live"),
            col_live=flags.get("col_live"),
            rows=None if rows is None else rows.to(p.device),
            cols=None if cols is None else cols.to(p.device),
            columns=place.columns,
            tensor_id=place.tensor_id,
        )


def _update_(entries: Sequence[Entry], sigma: float | Tensor, seed: int, step: int | Tensor) -> None:
    """Noise entries of one device."""
    views = [e.view() for e in entries]
    dense = [v.contiguous() for v in views]  # of channels_last weights a copy, whose noise goes by rows as everywhere
    demp_update_(
        dense,
        [e.row_live for e in entries],
        [e.col_live for e in entries],
        [e.rows for e in entries],
        [e.cols for e in entries],
        [e.columns for e in entries],
        sigma,
        seed,
        step,
        [e.tensor_id for e in entries],
    )
    for view, noised in zip(views, dense, strict=True):
        if noised is not view:
            view.copy_(noised)
