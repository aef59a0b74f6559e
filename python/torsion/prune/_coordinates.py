"""Where the elements of a cut parameter lay in the uncut one: noise is keyed by that, so no cut changes it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

Kept = dict[int, Tensor]
"""Axis -> original indices, int64 ``[n]``; of axis 1 of a grouped convolution ``[groups, n]``, within the group."""


@dataclass(frozen=True)
class Coordinates:
    """A parameter's place (its tensor id), its uncut shape, and what of each axis is left."""

    tensor_id: int
    shape: tuple[int, ...]
    kept: Kept = field(default_factory=dict)

    def after(self, cut: Mapping[int, Tensor]) -> Coordinates:
        """The coordinates after one more cut, whose indices count in the tensor as it was before it."""
        kept = dict(self.kept)
        for axis, indices in cut.items():
            old = kept.get(axis)
            if old is not None and old.dim() == 2 and 0 in cut:
                old = old[self._groups_left(len(old), cut[0])]
            kept[axis] = _composed(old, indices.to("cpu", torch.int64))
        return Coordinates(self.tensor_id, self.shape, kept)

    def _groups_left(self, groups: int, rows: Tensor) -> Tensor:
        """Which of the groups have one of ``rows``, counted before the cut: whole ones may go."""
        size = self.shape[0] if 0 not in self.kept else len(self.kept[0])
        left: Tensor = torch.unique(rows.to("cpu", torch.int64) * groups // size)
        return left

    @property
    def columns(self) -> int:
        """Elements in a row of the uncut tensor, rows being along its first axis."""
        return math.prod(self.shape[1:])

    def rows(self) -> Tensor | None:
        """The original row of each row, int64; None: all are there."""
        return self.kept.get(0)

    def flat_columns(self) -> Tensor | None:
        """The original place in its row of each element of a row, int64 ``[K]`` or ``[groups, K]``; None: as it is."""
        if not any(axis > 0 for axis in self.kept):
            return None
        groups = max((k.shape[0] for k in self.kept.values() if k.dim() == 2), default=1)
        flat = torch.zeros(groups, 1, dtype=torch.int64, device="cpu")
        for axis in range(1, len(self.shape)):
            indices = self.kept.get(axis, torch.arange(self.shape[axis], device="cpu"))
            stride = math.prod(self.shape[axis + 1 :])
            flat = (flat[:, :, None] + indices.reshape(-1, 1, indices.shape[-1]) * stride).flatten(1)
        return flat if groups > 1 else flat[0]


def _composed(old: Tensor | None, new: Tensor) -> Tensor:
    """What is left of ``old`` after ``new``, each of one dimension or two."""
    if old is None:
        return new
    if old.dim() == 1:
        return old[new]
    if new.dim() == 1:
        return old[:, new]
    return old.gather(1, new)
