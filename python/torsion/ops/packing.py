"""Live blocks of a weight on their own, and adding branches whose live channels differ."""

from __future__ import annotations

import torch
from torch import Tensor

from torsion.ops import _entry
from torsion.ops._blocks import Axis, axis, check_kind, gather, scatter_


def _axes(op: str, weight: Tensor, in_idx: Tensor | None, out_idx: Tensor | None) -> tuple[Axis, Axis]:
    out = axis(op, "out_idx", out_idx, weight.shape[0], weight.device)
    return out, axis(op, "in_idx", in_idx, weight.shape[1], weight.device)


def _list(ax: Axis, device: torch.device, align: int = 1) -> Tensor:
    live = torch.arange(ax.live, dtype=torch.int32, device=device) if ax.index is None else ax.index
    return torch.nn.functional.pad(live, (0, -ax.live % align), value=-1)


def pack_weight(weight: Tensor, in_idx: Tensor | None = None, out_idx: Tensor | None = None, align: int = 16) -> Tensor:
    """The live block of a weight with rows and columns of zeros up to a multiple of ``align``.

    Args:
        weight: ``[N, K]`` or ``[N, K, kh, kw]``. No gradient flows back; :func:`unpack_grad_` carries it.
        in_idx: int32 ``[K']``, live inputs; None: all.
        out_idx: int32 ``[N']``, live outputs; None: all.
        align: at least 1.

    Returns:
        ``[N' + pad, K' + pad, ...]``, new.

    Raises:
        ValueError: a list or ``align`` that does not fit.
        TypeError: a list that is not int32.
    """
    if align < 1:
        raise ValueError(f"pack_weight: align={align} must be at least 1")
    if weight.dim() not in (2, 4):
        raise ValueError(f"pack_weight: weight must have 2 or 4 dims, has shape {list(weight.shape)}")
    out, inp = _axes("pack_weight", weight, in_idx, out_idx)
    flat = weight.detach().contiguous()
    flat = flat.flatten(2) if weight.dim() == 4 else flat
    packed = gather(flat, _list(out, weight.device, align), _list(inp, weight.device, align))
    return packed.view(*packed.shape[:2], *weight.shape[2:])


def unpack_grad_(full: Tensor, packed: Tensor, in_idx: Tensor | None = None, out_idx: Tensor | None = None) -> Tensor:
    """Put the gradient of a packed weight into its place in that of the whole one, zeros elsewhere, in place.

    Args:
        full: contiguous ``[N, K]`` or ``[N, K, kh, kw]``; overwritten.
        packed: as :func:`pack_weight` makes it; its padding is not read.
        in_idx: int32 ``[K']``, live inputs; None: all.
        out_idx: int32 ``[N']``, live outputs; None: all.

    Returns:
        ``full``.

    Raises:
        ValueError: a list that does not fit, or ``packed`` smaller than the live block.
        TypeError: a list that is not int32, or dtypes that differ.
    """
    if full.dtype != packed.dtype:
        raise TypeError(f"unpack_grad_: full is {full.dtype}, packed {packed.dtype}")
    if not full.is_contiguous() or full.dim() != packed.dim() or full.dim() not in (2, 4):
        raise ValueError("unpack_grad_: full must be contiguous and have 2 or 4 dims, as many as packed")
    out, inp = _axes("unpack_grad_", full, in_idx, out_idx)
    if packed.shape[0] < out.live or packed.shape[1] < inp.live or packed.shape[2:] != full.shape[2:]:
        raise ValueError(
            f"unpack_grad_: packed has shape {list(packed.shape)}, the live block is [{out.live}, {inp.live}]"
        )
    live = packed.detach()[: out.live, : inp.live].contiguous()
    to, source = (full, live) if full.dim() == 2 else (full.flatten(2), live.flatten(2))
    with torch.no_grad():
        scatter_(to, source, _list(out, full.device), _list(inp, full.device))
    torch.autograd.graph.increment_version(full)
    return full


def residual_select_add_(out: Tensor, x: Tensor, src_idx: Tensor, dst_idx: Tensor) -> Tensor:
    """``out[:, dst_idx] += x[:, src_idx]`` in place, with autograd: a shortcut between branches cut differently.

    Args:
        out: ``[B, N, ...]``; updated.
        x: ``[B, K, ...]``, of the same dtype.
        src_idx: int32 ``[n]``: positions of the channels alive on both sides in x, ascending and unique.
        dst_idx: int32 ``[n]``: their positions in ``out``.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes or lists that do not fit.
        TypeError: a list that is not int32, or dtypes that differ.
    """
    op = "residual_select_add_"
    if out.dtype != x.dtype:
        raise TypeError(f"{op}: out is {out.dtype}, x {x.dtype}")
    if out.dim() != x.dim() or out.dim() < 2 or out.shape[:1] != x.shape[:1] or out.shape[2:] != x.shape[2:]:
        raise ValueError(f"{op}: out and x may differ in dim 1 only, are {list(out.shape)} and {list(x.shape)}")
    for name, index, t in (("src_idx", src_idx, x), ("dst_idx", dst_idx, out)):
        check_kind(op, name, index, t.shape[1], t.device)
    if src_idx.shape != dst_idx.shape:
        raise ValueError(f"{op}: src_idx lists {len(src_idx)} channels, dst_idx {len(dst_idx)}")
    if _entry.is_eager(src_idx, dst_idx):
        src, dst = (axis(op, n, i, t.shape[1], t.device) for n, i, t in
                    (("src_idx", src_idx, x), ("dst_idx", dst_idx, out)))  # fmt: skip
        if src.prefix and dst.prefix:
            out[:, : dst.live] += x[:, : src.live]
            return out
    return out.index_add_(1, dst_idx, x.index_select(1, src_idx))


_LISTS = "Tensor? in_idx=None, Tensor? out_idx=None"
_entry.define_composite("pack_weight", f"(Tensor weight, {_LISTS}, int align=16) -> Tensor", pack_weight)
_entry.define_composite("unpack_grad_", f"(Tensor(a!) full, Tensor packed, {_LISTS}) -> Tensor(a!)", unpack_grad_)
_entry.define_composite(
    "residual_select_add_",
    "(Tensor(a!) out, Tensor x, Tensor src_idx, Tensor dst_idx) -> Tensor(a!)",
    residual_select_add_,
)
