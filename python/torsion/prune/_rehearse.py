"""A rehearsal of the cut: what depends on fixed numbers of channels shows when there are fewer of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torsion.prune._cut import kept_units, plan_of
from torsion.prune._follow import Follower, Step
from torsion.prune._keep import align_and_keep
from torsion.prune._moves import squash
from torsion.prune._shrink import Undo, shrink_module
from torsion.prune._structure import Structure, call
from torsion.prune._symbols import Symbols, symbols_of


def rehearse(model: nn.Module, structure: Structure, log: Sequence[Step], example_inputs: Any) -> None:
    """Cut every other unit of each layer, run, undo; refuse what did not move as the first run said it would.

    A view to a fixed shape fails to run. A slice with fixed bounds runs, but takes other channels than it should: both
    runs are compared call by call, channel by channel. Within :func:`torsion.prune._structure.frozen`.

    Args:
        model: the model, left as it is.
        structure: its units; what fails is added to its refusals.
        log: calls of the run that found them.
        example_inputs: what to run it on.
    """
    first = 0
    while first < 2:
        kept = kept_units(structure, align_and_keep(structure, _every_other(structure, first)))
        found = None if bool(kept.all()) else _differs(model, structure, log, kept, example_inputs)
        if found is None:
            first += 1
            continue
        symbols, why = found
        structure.symbols.refuse(symbols, why)
        structure.refresh()


def _every_other(structure: Structure, first: int) -> dict[str, Tensor]:
    """Masks that cut every other class of each layer, beginning with the ``first``; refused ones stay."""
    symbols = structure.symbols
    refused = {symbols.find(s) for s in symbols.refused}
    goes: dict[int, bool] = {}
    masks = {}
    for block in symbols.blocks.values():
        if block.layer not in structure.layers:
            continue
        roots = [symbols.find(s) for s in block.ids.tolist()]
        new = [r for r in dict.fromkeys(roots) if r not in goes]
        goes.update({r: i % 2 == first and r not in refused for i, r in enumerate(new)})
        masks[block.layer] = torch.tensor([not goes[r] for r in roots], device="cpu")
    return masks


def _differs(
    model: nn.Module, structure: Structure, log: Sequence[Step], kept: Tensor, inputs: Any
) -> tuple[list[int], str] | None:
    """Symbols of the first call that goes wrong with fewer units, and why; None when all go right."""
    undo = Undo()
    failed = ""
    try:
        shrink_module(model, structure, plan_of(structure, kept), kept, undo)
        follower = Follower(model, Symbols(depthwise=set(structure.symbols.depthwise)))
    except BaseException:
        undo.run()
        raise
    try:
        with follower:
            follower.finish(call(model, inputs))
    except Exception as error:
        failed = f" ({type(error).__name__}: {error})".replace("\n", " ")
    finally:
        undo.run()
    at = _first_difference(structure, log, follower, kept)
    if at is None and not failed:
        return None
    # A call that failed is the last of its log, unless the model itself raised after it.
    at = min(len(follower.log) - 1 if at is None else at, len(log) - 1)
    for step in reversed(log[: at + 1]):
        gone = [s for code in [*step.inputs, *step.outputs] for s in symbols_of(code).unique().tolist() if s >= 0]
        gone = [s for s in gone if not kept[s]]
        if gone:
            return gone, f"{step.op} depends on a fixed number of channels{failed}"
    return (~kept).nonzero().flatten().tolist(), f"the model depends on a fixed number of channels{failed}"


def _first_difference(structure: Structure, log: Sequence[Step], follower: Follower, kept: Tensor) -> int | None:
    """Position of the first call whose channels are not those of the first run that are left."""
    names = _translation(structure.symbols, follower.symbols, kept)
    for i, (before, now) in enumerate(zip(log, follower.log, strict=False)):
        if before.op != now.op:
            return i
        if i + 1 == len(follower.log) < len(log):
            return i
        for old, new in zip(before.outputs, now.outputs, strict=False):
            if not _agree(old, new, names, kept):
                return i
        if len(before.outputs) != len(now.outputs):
            return i
    return None


def _translation(old: Symbols, new: Symbols, kept: Tensor) -> Tensor:
    """Symbol of the second run -> symbol of the first, int64; one more element for "none", last."""
    names = torch.full((len(new.parent) + 1,), -1, device="cpu")
    for weight, block in new.blocks.items():
        first = old.blocks.get(weight)
        left = first.ids[kept[first.ids]] if first is not None else block.ids[:0]
        if len(left) == len(block.ids):
            names[block.ids] = left
    return names


def _agree(old: Tensor, new: Tensor, names: Tensor, kept: Tensor) -> bool:
    """Whether ``new`` holds the channels of ``old`` that are left, in its order."""
    if sum(n > 1 for n in old.shape) > 1:
        return True  # spread over several dimensions: seen where they are merged or read
    symbols = symbols_of(old).flatten()
    left = symbols[(symbols < 0) | kept[symbols.clamp(min=0)]]
    renamed = names[symbols_of(new)].flatten()
    if len(left) != len(renamed):
        # One unit is left: a tensor that belongs to it as a whole.
        left, renamed = squash(left), squash(renamed)
    return torch.equal(left, renamed)
