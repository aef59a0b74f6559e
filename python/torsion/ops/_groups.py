"""Live channels of a grouped convolution: equal numbers per group, made equal by channels of zeros."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from torsion.ops._blocks import Axis, gather, scatter_


@dataclass(frozen=True)
class Groups:
    """How a grouped convolution is packed; groups without a live output are left out.

    Attributes:
        count: groups that are left.
        inputs: int32 ``[count * kin]``, channel of the input for each of the packed ones, -1: zeros.
        outputs: int32 ``[count * kout]``, output channel for each of the packed ones, -1: computed for nothing.
        rows: one int32 ``[kout]`` per group left: rows of the weight.
        columns: one int32 ``[kin]`` per group left: columns of the weight, within the group.
        places: int32 ``[N']``: where among the packed outputs the live ones lie, in order; None: they are all.
    """

    count: int
    inputs: Tensor
    outputs: Tensor
    rows: tuple[Tensor, ...]
    columns: tuple[Tensor, ...]
    places: Tensor | None


def _live(ax: Axis) -> list[int]:
    return list(range(ax.live)) if ax.index is None or ax.prefix else ax.index.tolist()


def _padded(entries: list[int], n: int) -> list[int]:
    return entries + [-1] * (n - len(entries))


def plan(inp: Axis, out: Axis, groups: int, device: torch.device) -> Groups:
    """Pack the live channels of ``groups`` groups."""
    k, n = inp.size // groups, out.size // groups
    ins: list[list[int]] = [[] for _ in range(groups)]
    outs: list[list[int]] = [[] for _ in range(groups)]
    for c in _live(inp):
        ins[c // k].append(c)
    for c in _live(out):
        outs[c // n].append(c)
    kept = [g for g in range(groups) if outs[g]]
    # A convolution over no channel is none for torch: one of zeros.
    kin = max([1, *(len(ins[g]) for g in kept)])
    kout = max([1, *(len(outs[g]) for g in kept)])

    def listed(entries: list[int]) -> Tensor:
        return torch.tensor(entries, dtype=torch.int32, device=device)

    inputs = [c for g in kept for c in _padded(ins[g], kin)]
    outputs = [c for g in kept for c in _padded(outs[g], kout)]
    places = None if -1 not in outputs else listed([k for k, c in enumerate(outputs) if c >= 0])
    rows = tuple(listed(_padded(outs[g], kout)) for g in kept)
    columns = tuple(listed(_padded([c - g * k for c in ins[g]], kin)) for g in kept)
    return Groups(len(kept), listed(inputs), listed(outputs), rows, columns, places)


def pack(weight: Tensor, groups: Groups) -> Tensor:
    """``[count * kout, kin, kernel]`` of the weight ``[N, K / groups, kernel]``."""
    return torch.cat([gather(weight, r, c) for r, c in zip(groups.rows, groups.columns, strict=True)])


def unpack(packed: Tensor, weight_shape: list[int], groups: Groups) -> Tensor:
    """The gradient of a weight from that of what :func:`pack` made of it."""
    full = packed.new_zeros(weight_shape)
    part = packed.new_empty(weight_shape)
    for dw, r, c in zip(packed.chunk(groups.count), groups.rows, groups.columns, strict=True):
        # Every row belongs to one group, so adding them up puts each into its place.
        full += scatter_(part, dw.contiguous(), r, c)
    return full
