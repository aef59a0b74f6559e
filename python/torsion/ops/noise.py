"""DemP's noise; rule in ``csrc/rules/demp.h``, specification in :mod:`torsion.reference`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torsion.ops import _plain
from torsion.ops.philox import DTYPES
from torsion.reference import demp

_plain.register("demp_update_", demp.demp_update_, (0,))


def demp_update_(
    params: Sequence[Tensor],
    row_live: Sequence[Tensor | None],
    col_live: Sequence[Tensor | None],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
    orig_cols: Sequence[int],
    sigma: float | Tensor,
    seed: int,
    step: int | Tensor,
    tensor_ids: Sequence[int],
    *,
    backend: str | None = None,
) -> None:
    """Add noise to the live entries of n parameters, in place: ``p[r, c] += sigma * xi(e)`` (DemP, arXiv 2403.07688).

    Parameter i is seen as ``[R, K]``: its first dim, and the others flattened. ``xi`` is :func:`philox_normal` of
    float32, or of float64 for float64 parameters, and e the entry's number in the tensor before any cut::

        e = rows[i][r] * orig_cols[i] + cols[i][g, c],   g = r * G // R

    so that cutting and noising commute bit for bit in float32 and float64. bfloat16 and float16 are noised in float32
    and rounded up or down at random, without bias, by 16 bits of Philox blocks of their own: rounded to nearest, a kick
    of 5e-5 would be lost on every number of 2^-6 or more. Dead entries keep their bits.

    8 bytes per float32 element.

    Args:
        params: n contiguous tensors, float32, float64, bfloat16 or float16; updated. Version counters are bumped.
        row_live: uint8 ``[R]`` each, 0 for rows that are left alone, or None: all are live.
        col_live: uint8 ``[K]`` each, or None.
        rows: int64 ``[R]`` each, the rows' numbers in the uncut tensor, or None: their own.
        cols: int64 ``[K]`` or ``[G, K]`` each, the columns' numbers in the uncut tensor; G groups of rows have their
            own (a grouped convolution). None: their own. Ascending ones are fastest.
        orig_cols: columns of the uncut tensor, each.
        sigma: standard deviation of the noise, finite and not negative; 0 writes nothing. A tensor of one number where
            only the device knows it: nothing waits for it, and it is not checked there.
        seed: in [0, 2^64).
        step: in [0, 2^32); a tensor like ``sigma``.
        tensor_ids: in [0, 2^32) each: the parameter's position in the uncut model.
        backend: "cuda", "triton", "cpu" or "reference"; TORSION_BACKEND or the best for the device when None.

    Raises:
        ValueError: lists that differ in length, a number out of range, an index tensor of the wrong size or outside
            the uncut tensor, a parameter that is not contiguous; named by list and place before anything is written.
        TypeError: a tensor of the wrong dtype, or a number of the wrong kind.
    """
    n = len(params)
    lists = {"row_live": row_live, "col_live": col_live, "rows": rows, "cols": cols}
    for name, entries in {**lists, "orig_cols": orig_cols, "tensor_ids": tensor_ids}.items():
        if len(entries) != n:
            raise ValueError(f"demp_update_: {n} params, but {name} has {len(entries)} entries")
    device = params[0].device if n else torch.device("cpu")
    sigma, step = _known("sigma", sigma, device), _known("step", step, device)
    if not isinstance(sigma, Tensor) and not (math.isfinite(sigma) and sigma >= 0):
        raise ValueError(f"demp_update_: sigma={sigma} must be finite and not negative")
    key = _plain.random_key("demp_update_", seed, 0 if isinstance(step, Tensor) else step, tensor_ids)
    for i in range(n):
        _check_parameter(i, params[i], row_live[i], col_live[i], rows[i], cols[i], orig_cols[i])
    if not n:
        return
    numbers = None
    if isinstance(sigma, Tensor) or isinstance(step, Tensor):
        numbers = torch.stack([_beside(x, device) for x in (sigma, step)])
        sigma, step = 0.0, 0
    _plain.run_(
        "demp_update_", device.type, backend, list(params), list(row_live), list(col_live), list(rows), list(cols),
        list(orig_cols), float(sigma), key, step, list(tensor_ids), numbers,
    )  # fmt: skip


def _known(name: str, x: Any, device: torch.device) -> Any:
    """The number itself where the host has it and the parameters are elsewhere; a tensor on a device stays one."""
    if not isinstance(x, Tensor):
        return x
    if x.numel() != 1:
        raise ValueError(f"demp_update_: {name} must be one number, has shape {tuple(x.shape)}")
    if name == "step" and (x.is_floating_point() or x.dtype == torch.bool):
        raise TypeError(f"demp_update_: step is {x.dtype}, must be an integer")
    return x.item() if x.is_cpu and device.type != "cpu" else x


def _beside(x: float | Tensor, device: torch.device) -> Tensor:
    """A 0-dim float64 tensor; a fill, where a copy of a number would wait for the device."""
    if isinstance(x, Tensor):
        return x.detach().to(device, torch.float64, non_blocking=True).reshape(())
    return torch.full((), x, dtype=torch.float64, device=device)


def _check_parameter(
    i: int,
    p: Tensor,
    row_live: Tensor | None,
    col_live: Tensor | None,
    rows: Tensor | None,
    cols: Tensor | None,
    orig_cols: int,
) -> None:
    if p.dtype not in DTYPES:
        raise TypeError(f"demp_update_: params[{i}] is {p.dtype}, must be float32, float64, bfloat16 or float16")
    if not p.is_contiguous():
        raise ValueError(f"demp_update_: params[{i}] is not contiguous; pass a contiguous tensor")
    n_rows = p.shape[0] if p.dim() else 1
    n_cols = p.numel() // n_rows if n_rows else 0
    groups = cols.shape[0] if cols is not None and cols.dim() == 2 else 1
    if groups == 0 or n_rows % groups:
        raise ValueError(f"demp_update_: cols[{i}] has {groups} lines, which do not divide {n_rows} rows")
    for name, t, dtype, size in (
        ("row_live", row_live, torch.uint8, n_rows),
        ("col_live", col_live, torch.uint8, n_cols),
        ("rows", rows, torch.int64, n_rows),
        ("cols", cols, torch.int64, groups * n_cols),
    ):
        if t is None:
            continue
        if t.dtype != dtype:
            raise TypeError(f"demp_update_: {name}[{i}] is {t.dtype}, must be {dtype}")
        if t.numel() != size or not t.is_contiguous() or t.device != p.device:
            raise ValueError(
                f"demp_update_: {name}[{i}] must be contiguous with {size} entries on {p.device}, has {t.numel()} on "
                f"{t.device}"
            )
    if cols is None and n_cols > orig_cols:
        raise ValueError(f"demp_update_: orig_cols[{i}]={orig_cols} is less than the {n_cols} columns of params[{i}]")
    # Values on another device are not looked at: that would wait for it.
    for name, t, end in (("rows", rows, 2**62 // max(1, orig_cols)), ("cols", cols, orig_cols)):
        if t is not None and t.is_cpu and t.numel() and not 0 <= int(t.min()) <= int(t.max()) < end:
            raise ValueError(f"demp_update_: {name}[{i}] holds numbers outside [0, {end})")
