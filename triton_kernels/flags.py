"""The detector of dead units (arXiv 2403.07688); the twin of ``csrc/cpu/flags.cpp``.

    ever_active    some y > tau            abs_max    some |y| > tau
    sum_le         sum of y > tau          dormant    sum |y| C > tau times that over the C channels that are finite

A NaN makes its channel live. The first two: one launch; programs share the channels out in tiles and the places of each
tile among them, stop when its channels are flagged, and store 1 for what they find, which any number of programs may do
in any order. Traffic: dead channels in full, of the others what comes before their first hit. The last two: sums in
float64, one for each program, added up in order by a second launch: every channel that is not flagged is read in full
(``dormant``: every channel), and 8 bytes are written for each program and channel. There are no atomics.

An activation is seen as ``[outer, channels, inner]`` with any strides; addresses are 64-bit.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .engine import INTERPRETED, TILE, WARPS, on
from .normals import WORDS, case, check_device, maths

CRITERIA = ("ever_active", "abs_max", "sum_le", "dormant")

# Channels and places of a tile: places that lie side by side make long rows of it.
SQUARE, LONG = (64, 64), (4, 1024)
# Programs for which a launch is cut into parts: a few for each multiprocessor of a large GPU.
PROGRAMS = 4 if INTERPRETED else 512


@triton.jit
def tile_of(unit, inner, s_outer, s_inner, BM: tl.constexpr):
    """Offset of each place of a tile, and whether there is such a place; units count the tiles of a channel."""
    across = tl.cdiv(inner, BM)
    i = unit % across * BM + tl.arange(0, BM)
    return unit // across * s_outer + i * s_inner, i < inner


@triton.jit(do_not_specialize=["tau"])
def any_kernel(
    y, flags, tau, channels, units, inner, s_outer, s_channel, s_inner,
    ABS: tl.constexpr, MATHS: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Flags channels of which some value exceeds ``tau``, the bits of a float64. Units are shared out in turn."""
    limit = tau.to(tl.int64).to(tl.float64, bitcast=True).to(MATHS)
    c = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    exists = c < channels
    flagged = (tl.load(flags + c, mask=exists, other=1) != 0).to(tl.int32)
    unit = tl.program_id(1).to(tl.int64)
    while (unit < units) & (tl.min(flagged, 0) == 0):
        place, is_place = tile_of(unit, inner, s_outer, s_inner, BM)
        k = (flagged == 0)[:, None] & is_place[None, :]
        v = tl.load(y + (c * s_channel)[:, None] + place[None, :], mask=k, other=0).to(MATHS)
        if ABS:
            v = tl.abs(v)
        # Not v > limit: NaN is live. What was not read is 0, which no limit is below.
        found = tl.max(((v <= limit) == 0).to(tl.int32), 1)
        tl.store(flags + c, 1, mask=found != 0)
        # Past the cache of this multiprocessor: what the other programs of these channels have found.
        others = tl.load(flags + c, mask=exists, other=1, volatile=True) != 0
        flagged = flagged | found | others.to(tl.int32)
        unit += tl.num_programs(1)


@triton.jit
def sum_kernel(
    y, flags, partial, channels, units, inner, s_outer, s_channel, s_inner,
    ABS: tl.constexpr, SKIP: tl.constexpr, BC: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Sums of a part of the places, float64, to ``partial[part, channel]``; with SKIP 0 for flagged channels."""
    c = tl.program_id(0).to(tl.int64) * BC + tl.arange(0, BC)
    k_channel = c < channels
    if SKIP:
        k_channel = k_channel & (tl.load(flags + c, mask=k_channel, other=1) == 0)
    total = tl.zeros([BC, BM], tl.float64)
    unit = tl.program_id(1).to(tl.int64)
    while unit < units:
        place, is_place = tile_of(unit, inner, s_outer, s_inner, BM)
        k = k_channel[:, None] & is_place[None, :]
        v = tl.load(y + (c * s_channel)[:, None] + place[None, :], mask=k, other=0).to(tl.float64)
        if ABS:
            v = tl.abs(v)
        total += v
        unit += tl.num_programs(1)
    tl.store(partial + tl.program_id(1).to(tl.int64) * channels + c, tl.sum(total, 1), mask=c < channels)


@triton.jit(do_not_specialize=["tau", "parts", "channels"])
def judge_kernel(partial, flags, tau, parts, channels, DORMANT: tl.constexpr, TILE: tl.constexpr):
    """Flags channels by their sums; a single program."""
    limit = tau.to(tl.int64).to(tl.float64, bitcast=True)
    lane = tl.arange(0, TILE).to(tl.int64)
    scale = 1.0
    if DORMANT:
        sums = tl.zeros([TILE], tl.float64)
        count = tl.zeros([TILE], tl.float64)
        for at in range(0, channels, TILE):
            own = tl.zeros([TILE], tl.float64)
            for part in range(parts):
                own += tl.load(partial + part * channels.to(tl.int64) + at + lane, mask=at + lane < channels, other=0)
            finite = (own < float("inf")) & (at + lane < channels)
            sums += tl.where(finite, own, 0.0)
            count += finite.to(tl.float64)
        limit *= tl.sum(sums, 0)
        scale = tl.sum(count, 0)
    for at in range(0, channels, TILE):
        k = at + lane < channels
        own = tl.zeros([TILE], tl.float64)
        for part in range(parts):
            own += tl.load(partial + part * channels.to(tl.int64) + at + lane, mask=k, other=0)
        live = (own * scale <= limit) == 0
        if DORMANT:
            live = live | ((own < float("inf")) == 0)
        tl.store(flags + at + lane, 1, mask=k & live & (tl.load(flags + at + lane, mask=k, other=1) == 0))


class View(NamedTuple):
    """An activation as ``[outer, channels, inner]``, strides in elements."""

    outer: int
    channels: int
    inner: int
    s_outer: int
    s_channel: int
    s_inner: int

    def tile(self, sums: bool) -> tuple[int, int]:
        """Channels and places of a tile; of sums, which are float64, half as many places."""
        height, width = LONG if self.s_inner == 1 and self.inner >= LONG[1] // 2 else SQUARE
        return height, width // 2 if sums else width


def _merged(t: Tensor, first: int, end: int) -> tuple[int, int] | None:
    """Size and stride of these dims as one; None where there is no such stride."""
    size, stride = 1, 0
    for d in reversed(range(first, end)):
        if t.shape[d] == 1:
            continue
        if size == 1:
            stride = t.stride(d)
        elif t.stride(d) != stride * size:
            return None
        size *= t.shape[d]
    return size, stride


def view_of(y: Tensor, dim: int) -> View | None:
    """How the kernels can read ``y`` as it lies; None: not at all."""
    outside, inside = _merged(y, 0, dim), _merged(y, dim + 1, y.dim())
    if outside is None or inside is None:
        return None
    (outer, s_outer), (inner, s_inner) = outside, inside
    if inner == 1 or (outer > 1 and s_outer == inner * s_inner):  # [M, C], channels_last: places are one dim
        inner, s_inner, outer, s_outer = inner * outer, s_outer if inner == 1 else s_inner, 1, 0
    return View(outer, y.shape[dim], inner, s_outer, y.stride(dim) if y.shape[dim] > 1 else 1, s_inner)


def active_flags_(
    y: Tensor, flags: Tensor, count: Tensor, channel_dim: int = 1, criterion: str = "ever_active", tau: float = 0.0
) -> None:
    """Flags the live channels of ``y``; see :func:`torsion.ops.active_flags_`."""
    op = "active_flags_"
    device = check_device(op, y, flags, count)
    if criterion not in CRITERIA or y.dtype not in WORDS or not -y.dim() <= channel_dim < y.dim():
        raise RuntimeError(f"{op}: no criterion {criterion!r}, dtype {y.dtype} or dim {channel_dim} of {list(y.shape)}")
    dim = channel_dim % y.dim()
    if flags.dtype != torch.uint8 or flags.numel() != y.shape[dim] or not flags.is_contiguous():
        raise RuntimeError(f"{op}: flags must be contiguous uint8 [{y.shape[dim]}], is {flags.dtype}")
    if count.dtype != torch.int64 or count.numel() != 1:
        raise RuntimeError(f"{op}: count must be one int64, is {count.dtype} {list(count.shape)}")
    with torch.no_grad(), on(device):
        count += y.shape[0]
        if y.numel() == 0:
            return
        view = view_of(y, dim)
        if view is None:
            y = y.contiguous()
            view = view_of(y, dim)
            assert view is not None
        _launch(y, flags, view, criterion, struct.unpack("q", struct.pack("d", tau))[0])


def _launch(y: Tensor, flags: Tensor, view: View, criterion: str, tau: int) -> None:
    any_hit = criterion in ("ever_active", "abs_max")
    height, width = view.tile(not any_hit)
    tiles, units = triton.cdiv(view.channels, height), view.outer * triton.cdiv(view.inner, width)
    # A number of the shape alone, for the sums are added up part by part.
    parts = max(1, min(units, PROGRAMS // tiles))
    places = (view.channels, units, view.inner, view.s_outer, view.s_channel, view.s_inner)
    options = {"BC": height, "BM": width, "num_warps": WARPS, "enable_fp_fusion": False}
    if any_hit:
        any_kernel[(tiles, parts)](
            y, flags, tau, *places, ABS=criterion == "abs_max", MATHS=maths(WORDS[y.dtype]), **options
        )
        return
    dormant = criterion == "dormant"
    partial = torch.empty(parts, view.channels, dtype=torch.float64, device=y.device)
    sum_kernel[(tiles, parts)](y, flags, partial, *places, ABS=dormant, SKIP=not dormant, **options)
    judge_kernel[(1,)](
        partial, flags, tau, parts, view.channels, DORMANT=dormant, TILE=TILE, num_warps=WARPS, enable_fp_fusion=False
    )


def audit_cases() -> Iterator[dict[str, Any]]:
    """What to compile without a GPU; see :func:`torsion.triton_kernels.engine.audit_cases`."""
    places = dict.fromkeys(("channels", "units", "inner", "s_outer", "s_channel", "s_inner"), "i32")
    # Of the strides, the one that is 1 is compiled in.
    layouts = {"planes": (LONG, "s_inner"), "rows": (SQUARE, "s_channel")}
    for layout, ((height, width), side_by_side) in layouts.items():
        sizes = {"BC": height, "BM": width, side_by_side: 1}
        scalars = {name: kind for name, kind in places.items() if name != side_by_side}
        aligned = tuple(name for name in scalars if name != "units")
        for word in WORDS.values():
            for measure in ("", " of sizes") if word == tl.float32 else ("",):
                yield case(
                    f"flags{measure} {layout} {word}",
                    any_kernel,
                    {"ABS": bool(measure), "MATHS": maths(word), **sizes},
                    {"y": f"*{word}", "flags": "*u8"},
                    scalars={"tau": "i64", **scalars},
                    aligned=aligned,
                )
            yield case(
                f"flags sums {layout} {word}",
                sum_kernel,
                {"ABS": True, "SKIP": False, **sizes, "BM": width // 2},
                {"y": f"*{word}", "flags": "*u8", "partial": "*fp64"},
                scalars=scalars,
                aligned=aligned,
            )
    for name, dormant in (("sum_le", False), ("dormant", True)):
        yield case(
            f"flags judge {name}",
            judge_kernel,
            {"DORMANT": dormant, "TILE": TILE},
            {"partial": "*fp64", "flags": "*u8"},
            scalars={"tau": "i64", "parts": "i32", "channels": "i32"},
        )
