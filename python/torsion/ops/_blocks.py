"""Selecting live rows and columns, and putting them back: compiled on the CPU, plain torch elsewhere."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor

from torsion.ops import _native

SCATTERED, PREFIX = -1, -2
PLAIN = (Tensor, torch.nn.Parameter)
"""Types of tensors that hold values; a tracer's do not."""


@dataclass(frozen=True)
class Axis:
    """What is live of one axis of a layer.

    Attributes:
        size: units there are.
        live: units that live.
        index: int32 ``[live]``, ascending; None: all of them.
        prefix: the live ones are the first, so that a view will do.
    """

    size: int
    live: int
    index: Tensor | None
    prefix: bool

    @property
    def whole(self) -> bool:
        """Whether all are live."""
        return self.live == self.size


_known: dict[tuple[torch.device, int, int, int, int], tuple[weakref.ref[Tensor], int]] = {}


def _kind(index: Tensor, size: int) -> int:
    if not index.is_cpu:
        return _remembered(index, size)
    return int(torch.ops.torsion.index_kind(index, size)) if _native.C is not None else _look(index, size)


def _look(index: Tensor, size: int) -> int:
    values = index.cpu().long()
    bad = (values < 0) | (values >= size)
    bad[1:] |= values[1:] <= values[:-1]
    n = values.numel()
    return int(bad.nonzero()[0]) if bad.any() else PREFIX if n == 0 or int(values[-1]) == n - 1 else SCATTERED


def _remembered(index: Tensor, size: int) -> int:
    """What a list was when it was last looked into: of one on a device, at most once for each address and version.

    As long as the tensor that was looked into lives, nothing else lies at its address.
    """
    key = (index.device, index.data_ptr(), 0 if index.is_inference() else index._version, index.numel(), size)
    found = _known.get(key)
    if found is None or found[0]() is None:
        if len(_known) > 4096:
            _known.clear()
        found = _known[key] = weakref.ref(index), _look(index, size)
    return found[1]


def check_kind(op: str, name: str, index: Tensor | None, size: int, device: torch.device) -> None:
    """What can be said of an index list without looking into it.

    Raises:
        TypeError: not int32.
        ValueError: not of one dim, on another device than the layer, or longer than the axis.
    """
    if index is None:
        return
    if not isinstance(index, Tensor):
        raise TypeError(f"{op}: {name} is a {type(index).__name__}, must be a tensor of torch.int32")
    if index.dtype != torch.int32:
        raise TypeError(f"{op}: {name} is {index.dtype}, must be torch.int32; call .to(torch.int32)")
    if index.dim() != 1:
        raise ValueError(f"{op}: {name} must have one dim, has shape {list(index.shape)}")
    if index.device != device:
        raise ValueError(f"{op}: {name} is on {index.device}, the layer on {device}")
    if index.numel() > size:
        raise ValueError(f"{op}: {name} lists {index.numel()} of {size} units")


def axis(op: str, name: str, index: Tensor | None, size: int, device: torch.device) -> Axis:
    """An axis by its list of live units.

    A list on another device than the CPU is looked into when its address or its version is new.

    Raises:
        TypeError: not int32.
        ValueError: not of one dim, not ascending, with repetitions or outside ``[0, size)``.
    """
    check_kind(op, name, index, size, device)
    if index is None:
        return Axis(size, size, None, True)
    index = index.contiguous()
    if torch.compiler.is_compiling() or type(index) not in PLAIN:  # nothing to look into
        return Axis(size, index.numel(), index, False)
    kind = _kind(index, size)
    if kind >= 0:
        value = int(index[kind])
        if not 0 <= value < size:
            raise ValueError(f"{op}: {name}[{kind}]={value} lies outside [0, {size})")
        raise ValueError(f"{op}: {name}[{kind}]={value} follows {int(index[kind - 1])}; sort it and drop repetitions")
    live = index.numel()
    return Axis(size, live, None if live == size else index, kind == PREFIX)


def gather(source: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """``source[rows][:, columns]`` of ``[rows, columns]`` or ``[rows, columns, inner]``, -1 standing for zeros; new."""
    if source.is_cpu and _native.C is not None:
        return torch.ops.torsion.gather_blocks(_laid(source), rows, columns)  # type: ignore[no-any-return]
    out = source
    for dim, index in ((0, rows), (1, columns)):
        if index is None:
            continue
        if source.shape[dim] == 0:
            out = out.new_zeros([index.numel() if d == dim else s for d, s in enumerate(out.shape)])
            continue
        out = out.index_select(dim, index.clamp_min(0))
        if bool((index < 0).any()):
            dead = (index < 0).reshape([-1 if d == dim else 1 for d in range(out.dim())])
            out = out.masked_fill(dead, 0)
    return out.clone() if out is source else out.contiguous()


def scatter_(to: Tensor, source: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    """``to[rows][:, columns] = source`` and zero elsewhere; entries of -1 are left out. Returns ``to``."""
    if to.is_cpu and _native.C is not None:
        torch.ops.torsion.scatter_blocks_(to, _laid(source), rows, columns)
        return to
    if rows is None and columns is None:
        return to.copy_(source)
    to.zero_()
    places: list[Tensor] = []
    for dim, index in ((0, rows), (1, columns)):
        place = torch.arange(to.shape[dim], device=to.device) if index is None else index.long()
        if index is not None and bool((place < 0).any()):
            source = source.index_select(dim, (place >= 0).nonzero().flatten())
            place = place[place >= 0]
        places.append(place)
    to[places[0].unsqueeze(1), places[1]] = source
    return to


def silenced(t: Tensor, rows: Axis | None, columns: Axis | None) -> Tensor:
    """A copy of ``[rows, columns]`` or ``[rows, columns, inner]`` with zeros in what is dead of either."""
    if t.is_cpu and _native.C is not None:
        return torch.ops.torsion.silenced_blocks(_laid(t), _index(rows), _index(columns))  # type: ignore[no-any-return]
    return silence_(t.clone(), rows, columns)


def silence_(t: Tensor, rows: Axis | None, columns: Axis | None) -> Tensor:
    """Zeros in what is dead of either, in place; returns ``t``, whose columns lie side by side."""
    if t.is_cpu and _native.C is not None:
        torch.ops.torsion.silence_blocks_(t, _index(rows), _index(columns))
        return t
    for dim, ax in enumerate((rows, columns)):
        if ax is not None and ax.index is not None:
            dead = torch.ones(ax.size, dtype=torch.bool, device=t.device).index_fill_(0, ax.index.long(), False)
            t.masked_fill_(dead.view([-1 if d == dim else 1 for d in range(t.dim())]), 0)
    return t


def met_finite(product: Tensor, groups: int) -> bool:
    """Whether the first channel of each group of ``[B, C, H, W]`` holds no Inf and no NaN; waits for the device."""
    if product.is_cpu and _native.C is not None:
        return bool(torch.ops.torsion.met_finite(product, groups))
    return bool(product[:, :: max(1, product.shape[1] // groups)].isfinite().all())


def _index(ax: Axis | None) -> Tensor | None:
    return None if ax is None else ax.index


def _fake_gather(source: Tensor, rows: Tensor | None, columns: Tensor | None) -> Tensor:
    sizes = [s if i is None else i.shape[0] for s, i in zip(source.shape[:2], (rows, columns), strict=True)]
    return source.new_empty([*sizes, *source.shape[2:]])


def _fake_scatter(to: Tensor, source: Tensor, rows: Tensor | None, columns: Tensor | None) -> None:
    del to, source, rows, columns


if _native.C is not None:
    torch.library.register_fake("torsion::gather_blocks", _fake_gather)
    torch.library.register_fake("torsion::scatter_blocks_", _fake_scatter)


def _laid(t: Tensor) -> Tensor:
    """``t`` with its columns, and the numbers of a block, side by side."""
    inner = t.shape[2] if t.dim() == 3 else 1
    good = (t.shape[1] == 1 or t.stride(1) == inner) and (inner == 1 or t.stride(2) == 1)
    return t if good or t.numel() == 0 else t.contiguous()


def relu_bits_(z: Tensor) -> Tensor:
    """``z = max(z, 0)`` in place; returns uint8 ``[ceil(n / 8)]``, a bit for each number above 0 in memory order.

    Args:
        z: without holes.
    """
    if z.is_cpu and _native.C is not None:
        return torch.ops.torsion.relu_bits_(z)  # type: ignore[no-any-return]
    flat = _flat(z)
    on = ~(flat <= 0)
    flat.masked_fill_(~on, 0)
    padded = torch.nn.functional.pad(on.to(torch.uint8), (0, -on.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, device=z.device, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def keep_bits_(dz: Tensor, bits: Tensor) -> Tensor:
    """Zero the numbers whose bit is not set, in place; ``dz`` is laid out as :func:`relu_bits_` had it."""
    if dz.is_cpu and _native.C is not None:
        torch.ops.torsion.keep_bits_(dz, bits)
        return dz
    flat = _flat(dz)
    shifts = torch.arange(8, device=dz.device, dtype=torch.uint8)
    on = ((bits.unsqueeze(1) >> shifts) & 1).flatten()[: flat.numel()].bool()
    flat.masked_fill_(~on, 0)
    return dz


def _flat(t: Tensor) -> Tensor:
    """The numbers of a tensor without holes, in the order of memory."""
    return t.as_strided((t.numel(),), (1,))
