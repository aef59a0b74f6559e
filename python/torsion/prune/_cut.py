"""The physical cut: smaller parameters in the same modules, the optimizer's state with them, and the way back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torsion.optim import Lookbehind
from torsion.prune import _compare
from torsion.prune._demp_checks import unsharded
from torsion.prune._keep import align_and_keep, kept_classes
from torsion.prune._ranks import unwrapped, wrapper
from torsion.prune._report import LayerReport, Report
from torsion.prune._shrink import Undo, check_copies, check_optimizer, shrink_module, shrink_optimizer
from torsion.prune._structure import Structure, check_model, trace

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 5e-2}
"""Largest difference of an output that a cut may make, times max(1, largest output), by dtype (specification)."""


@torch.inference_mode(False)  # whose tensors could not be trained
@torch.no_grad()
def cut(
    model: nn.Module,
    structure: Structure,
    keep: Mapping[str, Tensor],
    *,
    optimizer: Optimizer | None = None,
    also: Iterable[nn.Module] = (),
    inputs: Sequence[Any] = (),
    check: bool = True,
    tolerance: Mapping[torch.dtype, float] | None = None,
) -> Report:
    """Cut ``model`` in place to the units in ``keep``.

    Modules and parameter names stay. Parameters that shrink become new ``nn.Parameter`` objects without gradients; the
    optimizer's groups point to them, and its state of their shape shrinks along. Everything else in its state (step
    counters, scalars) stays the very same object. ``structure`` is kept up to date.

    Args:
        model: the model that ``structure`` was traced from.
        structure: its units.
        keep: layer -> bool mask, as :func:`torsion.prune._keep.align_and_keep` gives them; missing: all.
        optimizer: holds the parameters, or some of them.
        also: modules with the parameter names and shapes of ``model``, such as an EMA copy, cut alike.
        inputs: batches to run before and after the cut, in evaluation mode, so that the outputs can be compared.
        check: undo the cut and raise when outputs differ more than ``tolerance``; False only reports the difference.
        tolerance: by dtype of the outputs, times max(1, largest output). Default: ``TOLERANCE``.

    Returns:
        What was cut.

    Raises:
        ValueError: a cut that would change the function, an optimizer whose state or a copy that cannot follow.
        RuntimeError: the outputs differ, or the smaller model does not run on ``inputs``.

    After an exception model, optimizer, copies and structure are what they were, bit for bit.
    """
    check_model(model)
    kept = kept_units(structure, keep)
    before = sum(p.numel() for p in model.parameters())
    sizes = {name: layer.units for name, layer in structure.layers.items()}
    if bool(kept.all()):
        return Report({n: LayerReport(u, u, 0) for n, u in sizes.items()}, before, before)
    refuse(structure, kept)
    refuse_uneven(structure, kept)
    plan = plan_of(structure, kept)
    copies = list(also)
    _plain(model, plan)
    check_copies(model, copies, plan)
    if optimizer is not None:
        check_optimizer(optimizer, {n: p for n, p in model.named_parameters() if n in plan})
    outputs = _compare.run(model, inputs)
    undo = Undo()
    difference = 0.0
    try:
        replaced = shrink_module(model, structure, plan, kept, undo)
        if optimizer is not None:
            shrink_optimizer(optimizer, replaced, undo)
        for copy in copies:
            shrink_module(copy, structure, plan, kept, undo)
        _drop_gradients(model, undo)
        if inputs:
            allowed = TOLERANCE if tolerance is None else tolerance
            difference = _compare.difference(model, inputs, outputs, allowed if check else None)
    except BaseException:
        undo.run()
        raise
    structure.shrink(kept)
    layers = {n: LayerReport(u, structure.layers[n].units, u - structure.layers[n].units) for n, u in sizes.items()}
    after = sum(p.numel() for p in model.parameters())
    return Report(layers, before, after, difference, plan)


def compact(
    model: nn.Module,
    live: Mapping[str, Tensor],
    example_inputs: Any,
    optimizer: Optimizer | None = None,
    align: int = 1,
    also: Iterable[nn.Module] | nn.Module = (),
) -> Report:
    """Cut the units that ``live`` says are dead, once and in place.

    Args:
        model: any module that runs eagerly. Modules and parameter names stay; parameters that shrink are new objects.
        live: qualified layer name -> bool mask over its units, as :func:`torsion.prune.live_units` gives them. A
            missing layer counts as all live; an all-dead one keeps one unit.
        example_inputs: a tensor, a tuple or list of positional arguments or a dict of keyword arguments; outputs before
            and after are compared on them.
        optimizer: its groups and state follow the cut. A Lookbehind or SAM between outer steps only.
        align: kept counts are rounded up to a multiple of it, capped at the width, >= 1.
        also: modules cut alike, such as an EMA copy.

    Returns:
        What was cut; ``print`` it for a table.

    Raises:
        ValueError: a name that makes no units, a mask of another length, a layer that cannot be cut without changing
            the network's function (logits, norms in the way, fixed sizes, operations that are not known), align < 1, a
            sharded model, an optimizer or a copy that cannot follow.
        TypeError: arguments of the wrong kind.
        RuntimeError: the model does not run on ``example_inputs``, or its outputs there change by more than the
            tolerance (1e-10 in float64, 1e-4 in float32, 5e-2 in half precision, times the largest output); an open
            outer step of Lookbehind.

    After an exception model and optimizer are what they were, bit for bit.
    """
    if isinstance(align, bool) or not isinstance(align, int):
        raise TypeError(f"align={align!r}: must be an integer")
    if align < 1:
        raise ValueError(f"align={align!r}: must be >= 1")
    copies = check_also(also)
    check_masks(live)
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer={type(optimizer).__name__}: must be a torch.optim.Optimizer")
    if optimizer is not None:
        unsharded(optimizer)
    if isinstance(optimizer, Lookbehind):
        optimizer._refuse_open("compact()")
    check_model(model)
    if wrapper(model) is not None:
        raise ValueError(
            "model=DistributedDataParallel: its buckets hold the parameters as they are; pass model.module, and wrap "
            "it anew after the cut"
        )
    model = unwrapped(model)
    structure = trace(model, example_inputs)
    for name, mask in live.items():
        if name not in structure.layers and name not in structure.protected:
            known = ", ".join(structure.layers) or "none"
            raise ValueError(
                f"{name!r}: no Linear or convolution of this name makes units; those that can be cut: {known}"
            )
        if name not in structure.layers and not bool(mask.all()):
            raise ValueError(f"{name}: cannot be cut: {structure.protected[name]}; leave it out of the masks")
    refuse(structure, kept_units(structure, {n: m for n, m in live.items() if n in structure.layers}))
    _all_of_a_group(structure, live)
    keep = align_and_keep(structure, live, None, 1, align, pad_norms=True)
    return cut(model, structure, keep, optimizer=optimizer, also=copies, inputs=[example_inputs])


def _all_of_a_group(structure: Structure, live: Mapping[str, Tensor]) -> None:
    """Raise ValueError for masks that take a GroupNorm's groups apart."""
    roots = structure.symbols.roots()
    kept = kept_classes(structure, {n: m for n, m in live.items() if n in structure.layers}, roots)
    for rows, why in structure.symbols.whole.values():
        counts = ((rows < 0) | kept[roots[rows.clamp(min=0)]]).sum(1)
        if bool(((counts > 0) & (counts < rows.size(1))).any()):
            raise ValueError(
                f"{why}: {counts.tolist()} of {rows.size(1)} channels in each group would be left, but the channels of "
                "a group share statistics; cut whole groups, or leave the layer before it out of the masks"
            )


def check_also(also: Any) -> list[nn.Module]:
    """``also`` as a list; raise TypeError unless it is modules."""
    if isinstance(also, nn.Module):
        return [also]
    if not isinstance(also, Iterable) or isinstance(also, (str, Tensor)):
        raise TypeError(f"also={type(also).__name__}: must be modules that are cut alike, such as (ema,)")
    copies = list(also)
    for i, copy in enumerate(copies):
        if not isinstance(copy, nn.Module):
            raise TypeError(f"also[{i}]={type(copy).__name__}: must be a torch.nn.Module")
    return copies


def check_masks(live: Any) -> None:
    """Raise TypeError unless ``live`` maps names to one-dimensional masks."""
    if not isinstance(live, Mapping):
        raise TypeError(f"live={type(live).__name__}: must map layer names to bool masks, as live_units() returns them")
    for name, mask in live.items():
        if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, torch.uint8):
            kind = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{name}: the mask is {kind}, must be a bool tensor with one element for each unit")


def kept_units(structure: Structure, keep: Mapping[str, Tensor]) -> Tensor:
    """Bool over symbols: what ``keep`` leaves of all units."""
    roots = structure.symbols.roots()
    return kept_classes(structure, keep, roots)[roots]


def refuse(structure: Structure, kept: Tensor) -> None:
    """Raise ValueError when ``kept`` (bool over symbols) cuts what would change the function."""
    symbols = structure.symbols
    reasons = {symbols.find(s): why for s, why in symbols.refused.items()}
    for block in symbols.blocks.values():
        for unit, s in enumerate(block.ids.tolist()):
            why = None if kept[s] else reasons.get(symbols.find(s))
            if why is not None:
                raise ValueError(
                    f"{block.layer}: cutting unit {unit} would change the network's function: {why}; leave the layer "
                    "out of the masks (DemP: exclude it)"
                )


def refuse_uneven(structure: Structure, kept: Tensor) -> None:
    """Raise ValueError when ``kept`` (bool over symbols) leaves a layer empty, or groups that cannot stand so."""
    symbols = structure.symbols
    for block in symbols.blocks.values():
        if not bool(kept[block.ids].any()):
            raise ValueError(f"{block.layer}: no unit would be left; keep at least one")
    for held, what in ((symbols.even, "equal"), (symbols.whole, "whole")):
        for rows, why in held.values():
            counts = ((rows < 0) | kept[rows.clamp(min=0)]).sum(1)
            bad = len(set(counts.tolist())) > 1 if what == "equal" else ((counts > 0) & (counts < rows.size(1))).any()
            if bool(bad):
                raise ValueError(
                    f"{why} would be left with {counts.tolist()} of {rows.size(1)} channels; the groups must stay "
                    f"{what}"
                )


def plan_of(structure: Structure, kept: Tensor) -> dict[str, dict[int, Tensor]]:
    """Parameter or buffer -> {axis: indices of what is left}, only where something goes."""
    plan: dict[str, dict[int, Tensor]] = {}
    for use in structure.symbols.uses.values():
        mask = (use.symbols < 0) | kept[use.symbols.clamp(min=0)]
        if not bool(mask.all()):
            if mask.dim() == 2:
                indices = torch.stack([row.nonzero().flatten() for row in mask if bool(row.any())])
            else:
                indices = mask.nonzero().flatten()
            plan.setdefault(use.name, {})[use.axis] = indices
    return plan


def _plain(model: nn.Module, plan: Mapping[str, Any]) -> None:
    """Raise ValueError for a parameter that an ordinary one cannot replace, such as a quantized one."""
    for name, p in model.named_parameters():
        if name in plan and type(p) is not nn.Parameter:
            raise ValueError(
                f"{name}: is a {type(p).__name__}, which cannot be cut; cut the model before it gets parameters of "
                "this kind"
            )


def _drop_gradients(model: nn.Module, undo: Undo) -> None:
    for p in model.parameters():
        if p.grad is not None:
            undo.add(setattr, p, "grad", p.grad)
            p.grad = None
