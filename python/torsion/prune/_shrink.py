"""Replacing parameters, buffers and optimizer state by smaller ones, each step with its undoing."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torsion.prune._structure import Structure

Plan = Mapping[str, Mapping[int, Tensor]]
"""Parameter or buffer -> axis -> int64 indices of what is left: [kept], or [groups, kept] for grouped convolutions."""


class Undo:
    """What to do, last first, to be back where the cut began."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], object]] = []

    def add(self, func: Callable[..., object], *args: Any) -> None:
        """Call ``func(*args)`` on the way back."""
        self._steps.append(lambda: func(*args))

    def set(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute, and back."""
        self.add(setattr, owner, name, getattr(owner, name))
        setattr(owner, name, value)

    def put(self, owner: dict[Any, Any], key: Any, value: Any) -> None:
        """Set an entry that exists, and back."""
        self.add(owner.__setitem__, key, owner[key])
        owner[key] = value

    def run(self) -> None:
        """Go back."""
        while self._steps:
            self._steps.pop()()


def smaller(t: Tensor, axes: Mapping[int, Tensor]) -> Tensor:
    """``t`` without what is not in ``axes``, in its own memory format."""
    out = t.detach()
    for axis, indices in sorted(axes.items(), key=lambda item: item[1].dim()):
        where = indices.to(t.device)
        if indices.dim() == 1:
            out = out.index_select(axis, where)
        else:
            parts = out.reshape(len(where), -1, *out.shape[1:])
            out = torch.cat([part.index_select(axis, i) for part, i in zip(parts, where, strict=True)])
    for layout in (torch.channels_last, torch.channels_last_3d):
        dims = 4 if layout is torch.channels_last else 5
        if t.dim() == dims and t.is_contiguous(memory_format=layout) and not t.is_contiguous():
            return out.contiguous(memory_format=layout)
    return out.contiguous()


def shrink_module(
    module: nn.Module, structure: Structure, plan: Plan, kept: Tensor, undo: Undo
) -> list[tuple[nn.Parameter, nn.Parameter, Mapping[int, Tensor]]]:
    """Replace the parameters and buffers in ``plan``, and make the modules' attributes say their new sizes.

    Args:
        module: the model, or a copy of it.
        structure: the model's units, as they were before the cut.
        plan: what is left of each parameter and buffer.
        kept: bool over symbols.
        undo: takes the way back.

    Returns:
        Old parameter, new parameter and the indices, for each that was replaced.
    """
    prefix = copy_prefix(module, plan)
    params = dict(module.named_parameters())
    buffers = dict(module.named_buffers())
    owners = _owners(module)
    replaced, changed = [], {}
    for name, axes in plan.items():
        old = params.get(prefix + name, buffers.get(prefix + name))
        if old is None:
            raise ValueError(f"{name}: the copy has no parameter or buffer of this name")
        new: Tensor = smaller(old, axes)
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
            new.__dict__.update(old.__dict__)
            replaced.append((old, new, axes))
        for owner, local in owners[id(old)]:
            undo.put(owner._parameters if isinstance(old, nn.Parameter) else owner._buffers, local, new)
            changed[id(owner)] = owner
    groups = _depthwise_groups(module, prefix, structure, plan)
    for owner in changed.values():
        _resize_layer(owner, groups.get(id(owner)), undo)
    for resize in structure.symbols.resizes.values():
        mask = (resize.symbols < 0) | kept[resize.symbols.clamp(min=0)]
        if not bool(mask.all()):
            _resize_norm(module.get_submodule(prefix + resize.module), resize.kind, mask, undo)
    return replaced


def _owners(module: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for m in module.modules():
        held: list[tuple[str, Tensor | None]] = [*m._parameters.items(), *m._buffers.items()]
        for local, t in held:
            if t is not None:
                owners.setdefault(id(t), []).append((m, local))
    return owners


def _depthwise_groups(module: nn.Module, prefix: str, structure: Structure, plan: Plan) -> dict[int, float]:
    """Module -> part of the groups that a depthwise convolution keeps."""
    parts = {}
    for name in structure.symbols.depthwise:
        if name in plan:
            owner = module.get_submodule((prefix + name).rpartition(".")[0])
            use = structure.symbols.uses[name, 0]
            parts[id(owner)] = len(plan[name][0]) / use.symbols.numel()
    return parts


def _resize_layer(owner: nn.Module, part: float | None, undo: Undo) -> None:
    weight = owner._parameters.get("weight")
    if weight is None:
        return
    if isinstance(owner, nn.Linear):
        undo.set(owner, "out_features", weight.shape[0])
        undo.set(owner, "in_features", weight.shape[1])
    elif isinstance(owner, nn.modules.conv._ConvNd):
        if part is not None:
            undo.set(owner, "groups", round(owner.groups * part))
        first, second = ("in_channels", "out_channels") if owner.transposed else ("out_channels", "in_channels")
        undo.set(owner, first, weight.shape[0])
        undo.set(owner, second, weight.shape[1] * owner.groups)


def _resize_norm(owner: nn.Module, kind: str, mask: Tensor, undo: Undo) -> None:
    """Tell a norm (or PReLU) of which ``mask`` is left how many channels it has."""
    count = int(mask.sum())
    if kind == "features":
        undo.set(owner, "num_features", count)
    elif kind == "prelu":
        undo.set(owner, "num_parameters", count)
    elif kind == "group_norm":
        undo.set(owner, "num_channels", count)
        undo.set(owner, "num_groups", int(mask.any(1).sum()))
    else:
        _rescale(owner, mask.numel() / count, count, undo)


def _rescale(owner: Any, ratio: float, count: int, undo: Undo) -> None:
    """Make an RMSNorm over fewer units what it was over all of them, of which the dead were 0.

    Its mean square is now ``ratio`` times what it was: a scale larger by sqrt(ratio) and an eps larger by ratio make
    up for it exactly.
    """
    eps = owner.eps if owner.eps is not None else torch.finfo(owner.weight.dtype).eps
    undo.set(owner, "normalized_shape", (count,))
    undo.set(owner, "eps", eps * ratio)
    with torch.no_grad():
        owner.weight.mul_(math.sqrt(ratio))  # its own tensor already, made by the cut


def copy_prefix(copy: nn.Module, plan: Plan) -> str:
    """What stands before the model's names in ``copy``: "module." in an averaged or data-parallel one."""
    names = {name for name, _ in [*copy.named_parameters(), *copy.named_buffers()]}
    return next((p for p in ("", "module.", "_orig_mod.") if all(p + name in names for name in plan)), "")


def check_copies(model: nn.Module, copies: Sequence[nn.Module], plan: Plan) -> None:
    """Raise ValueError unless each of ``copies`` has tensors of its own, in the model's shapes, for all of the plan."""
    own = dict([*model.named_parameters(), *model.named_buffers()])
    for i, copy in enumerate(copies):
        prefix = copy_prefix(copy, plan)
        theirs = dict([*copy.named_parameters(), *copy.named_buffers()])
        for name in plan:
            t = theirs.get(prefix + name)
            if t is None:
                raise ValueError(f"also[{i}]: has no {name}, which is cut in the model; pass a copy of the same model")
            if t.shape != own[name].shape:
                raise ValueError(
                    f"also[{i}].{name}: shape {tuple(t.shape)}, but {tuple(own[name].shape)} in the model; pass a copy "
                    "of the model as it is now"
                )
            if t is own[name]:
                raise ValueError(f"also[{i}].{name}: is the model's own; pass a copy with parameters of its own")


def check_optimizer(optimizer: Optimizer, params: Mapping[str, nn.Parameter]) -> None:
    """Raise ValueError when the optimizer keeps state of ``params`` (by name) that cannot follow a cut."""
    kind = type(optimizer).__name__
    for state in optimizer.state.values():
        for key, value in state.items() if isinstance(state, Mapping) else ():
            if isinstance(value, (list, tuple)) and any(isinstance(v, Tensor) for v in value):
                raise ValueError(
                    f"{kind}: its state {key!r} is a list of tensors, which cannot follow a cut; use another"
                )
    for name, p in params.items():
        for key, value in optimizer.state.get(p, {}).items():
            if isinstance(value, Tensor) and value.numel() > 1 and value.shape != p.shape:
                raise ValueError(
                    f"{name}: {kind} keeps {key!r} of shape {tuple(value.shape)} for a parameter of shape "
                    f"{tuple(p.shape)}, which cannot follow a cut; use an optimizer whose state has the parameter's "
                    "shape"
                )


def shrink_optimizer(
    optimizer: Optimizer, replaced: Iterable[tuple[nn.Parameter, nn.Parameter, Mapping[int, Tensor]]], undo: Undo
) -> None:
    """Point groups to the new parameters and cut the state of their shape; all other state stays the same objects."""
    by_id = {id(old): (old, new, axes) for old, new, axes in replaced}
    for group in optimizer.param_groups:
        for i, p in enumerate(group["params"]):
            if id(p) in by_id:
                undo.add(group["params"].__setitem__, i, p)
                group["params"][i] = by_id[id(p)][1]
    before = list(optimizer.state.items())
    undo.add(_refill, optimizer.state, before)
    after: list[tuple[Any, Any]] = []
    for p, state in before:
        if id(p) in by_id:
            old, new, axes = by_id[id(p)]
            same = {k for k, v in state.items() if isinstance(v, Tensor) and v.shape == old.shape and v.dim() > 0}
            after.append((new, {k: smaller(v, axes) if k in same else v for k, v in state.items()}))
        else:
            after.append((p, state))
    _refill(optimizer.state, after)


def _refill(state: Any, items: list[tuple[Any, Any]]) -> None:
    state.clear()
    state.update(items)
