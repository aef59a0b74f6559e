"""From masks to units that can be cut: ties, minimum counts, alignment, equal groups."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from torsion.prune._structure import Structure


def align_and_keep(
    structure: Structure,
    live: Mapping[str, Tensor],
    mean: Mapping[str, Tensor] | None = None,
    min_live: int = 1,
    align: int = 1,
    *,
    pad_norms: bool = True,
) -> dict[str, Tensor]:
    """The units that a cut by ``live`` may keep (specification, "The cut", 2 and 3).

    Units that are tied are kept where any of them is live. Dead ones are kept with them, largest mean first, ties by
    lowest index: the ``min_live`` with the largest mean of each layer, as many as make the count a multiple of
    ``align``, as many as make the groups of a grouped convolution equal, and those that share a GroupNorm's group with
    a live one.

    Args:
        structure: the model's units.
        live: layer -> bool mask over its units; a missing layer counts as all live.
        mean: layer -> mean absolute activation of its units; None: not known, so that the lowest index goes first.
        min_live: units that every layer keeps at least.
        align: what kept counts are multiples of, unless the layer is narrower.
        pad_norms: keep whole groups of a GroupNorm; False leaves it to the cut to refuse a part of one.

    Returns:
        Bool masks on the CPU of every layer of the structure.

    Raises:
        ValueError: a mask of another length than the layer has units.
    """
    symbols = structure.symbols
    roots = symbols.roots()
    kept = kept_classes(structure, live, roots)
    weight = torch.zeros(len(roots), dtype=torch.float64, device="cpu")
    layers = {b.layer: b.ids for b in symbols.blocks.values() if b.layer in structure.layers}
    for name, ids in layers.items():
        if mean is not None and name in mean:
            weight.scatter_reduce_(0, roots[ids], mean[name].double().cpu(), "amax")
    # Most alive first, ties by lowest index: a stable order of symbols.
    rank = torch.empty_like(roots)
    rank[torch.argsort(weight[roots], descending=True, stable=True)] = torch.arange(len(roots), device="cpu")

    def add(ids: Tensor, count: int) -> None:
        """Keep ``count`` more of ``ids``."""
        dead = ids[~kept[roots[ids]]]
        kept[roots[dead[torch.argsort(rank[dead])[:count]]]] = True

    if mean is not None:
        for ids in layers.values():
            kept[roots[ids[torch.argsort(rank[ids])[:min_live]]]] = True
    while not all(
        [*_counts(layers, kept, roots, add, min_live, align), *_sections(structure, kept, roots, add, pad_norms)]
    ):
        pass
    return {name: kept[roots[ids]] for name, ids in layers.items()}


def kept_classes(structure: Structure, live: Mapping[str, Tensor], roots: Tensor) -> Tensor:
    """Bool over representatives: kept where a layer has a live unit, where none has a mask, and where protected."""
    symbols = structure.symbols
    said = torch.zeros(len(roots), dtype=torch.bool, device="cpu")
    kept = torch.zeros(len(roots), dtype=torch.bool, device="cpu")
    for block in symbols.blocks.values():
        if block.layer not in structure.layers:
            continue
        mask = live.get(block.layer)
        if mask is None:
            mask = torch.ones(len(block.ids), dtype=torch.bool, device="cpu")
        mask = mask.detach().to("cpu", torch.bool)
        if mask.shape != block.ids.shape:
            raise ValueError(
                f"{block.layer}: the mask has shape {tuple(mask.shape)}, but the layer has {len(block.ids)} units; "
                "pass one bool for each of them"
            )
        said[roots[block.ids]] = True
        kept[roots[block.ids[mask]]] = True
    kept |= ~said
    protected = torch.tensor(sorted(symbols.protected), dtype=torch.int64, device="cpu")
    kept[roots[protected]] = True
    return kept


def _counts(
    layers: Mapping[str, Tensor],
    kept: Tensor,
    roots: Tensor,
    add: Callable[[Tensor, int], None],
    min_live: int,
    align: int,
) -> list[bool]:
    """Whether each layer's count was right; where it was not, units are added."""
    right = []
    for ids in layers.values():
        count = int(kept[roots[ids]].sum())
        target = min(len(ids), -(-max(count, min_live) // align) * align)
        right.append(count >= target)
        if count < target:
            add(ids, target - count)
    return right


def _sections(
    structure: Structure, kept: Tensor, roots: Tensor, add: Callable[[Tensor, int], None], pad_norms: bool
) -> list[bool]:
    """Whether the groups of convolutions, and those of norms, were right; where not, units are added."""
    right = []
    for rows, _ in structure.symbols.even.values():
        counts = [int(((row < 0) | kept[roots[row.clamp(min=0)]]).sum()) for row in rows]
        target = max(1, *counts)
        for row, count in zip(rows, counts, strict=True):
            right.append(count >= target)
            if count < target:
                add(row[row >= 0], target - count)
    for rows, _ in structure.symbols.whole.values() if pad_norms else ():
        for row in rows:
            mask = (row < 0) | kept[roots[row.clamp(min=0)]]
            right.append(bool(mask.all()) or not bool(mask.any()))
            if not right[-1]:
                kept[roots[row[row >= 0]]] = True
    return right
