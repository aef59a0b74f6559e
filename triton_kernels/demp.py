"""DemP's noise over lists of tensors (arXiv 2403.07688); the twin of ``csrc/rules/demp.h``, operation by operation.

    p[r, c] += sigma xi(e)      where row r and column c are live
    e = rows[r] orig_cols + cols[g, c]       number of the element in the uncut tensor, so that noise outlives cuts

float32 bytes per element: reads and writes p (8); dead elements are not touched, nor is anything done for rows of which
none lives in a tile. Masks and index lists of rows are read once a strip; those of columns (1 and 8 bytes) once an
element, all but the first time from the cache. bfloat16 and float16 are noised in float32 and rounded up or down by 16
bits of Philox blocks of their own, whose counters have the top bit set. One launch for each kind of tensor in the list:
storage type, whether neighbours share Philox blocks, few columns or many. Addresses and element numbers are 64-bit.
``sigma`` and ``step`` may lie on the device.

The other ops of DemP: ``normals.py``, ``flags.py`` and ``masked.py``.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .engine import WARPS, on
from .flags import active_flags_
from .normals import WORDS, case, check_device, maths, normals_of_blocks, normals_of_elements, philox_normal_
from .philox import philox
from .storage import stochastic
from .table import _send

__all__ = ["active_flags_", "audit_cases", "demp_update_", "philox_normal_"]

# Columns of a record, int64. Addresses first; 0 stands for a list that is not there.
PARAM = tl.constexpr(0)
ROW_LIVE = tl.constexpr(1)
COL_LIVE = tl.constexpr(2)
ROWS = tl.constexpr(3)
COLS = tl.constexpr(4)
N_ROWS = tl.constexpr(5)
N_COLS = tl.constexpr(6)
ORIG_COLS = tl.constexpr(7)
GROUP_ROWS = tl.constexpr(8)
TENSOR_ID = tl.constexpr(9)
WIDTH = tl.constexpr(10)

# Columns of a tile, of which a strip has TURNS side by side, for each program one; and elements of it for each thread:
# a block of rounding bits where blocks are shared. Where they are not, each element takes the registers of a block.
WIDE, NARROW = 256, 32
SHARED_EACH, OWN_EACH = 8, 4
TURNS = tl.constexpr(8)


@triton.jit
def rounding_bits(w0, w1, w2, w3, ROWS_OF_TILE: tl.constexpr, BC: tl.constexpr):
    """16 bits for each element of a tile from the words of its blocks, eight elements each."""
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [ROWS_OF_TILE, BC])


@triton.jit
def rounding_bits_of(w0, w1, w2, w3, element):
    """16 bits for each element, of whose block these are the words."""
    lane = (element & 7).to(tl.uint32)
    low = tl.where((lane & 2) != 0, w1, w0)
    high = tl.where((lane & 2) != 0, w3, w2)
    return (tl.where((lane & 4) != 0, high, low) >> (16 * (lane & 1))) & 0xFFFF


@triton.jit
def present(address, n):
    """How many entries a list of n has: none where its address is 0."""
    return tl.where(address != 0, n, 0)


@triton.jit(do_not_specialize=["sigma", "seed", "step"])
def noise_kernel(
    records, strips, numbers, sigma, seed, step, WORD: tl.constexpr, MATHS: tl.constexpr, SHARED: tl.constexpr,
    ON_DEVICE: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A strip of BR rows. ``sigma``: bits of a float64. ON_DEVICE: ``numbers``, float64, are sigma and step instead.

    SHARED: columns are those of the uncut tensor and none is masked; they and the address are such that every eight
    elements from a multiple of eight columns make whole Philox blocks and whole 128-bit accesses.
    """
    std = sigma.to(tl.int64).to(tl.float64, bitcast=True)
    if ON_DEVICE:
        std = tl.load(numbers)
        step = tl.load(numbers + 1).to(tl.int64)
    if std == 0:
        return  # adding 0 would turn -0 into 0
    std = std.to(MATHS)
    seed = seed.to(tl.int64)
    step = step.to(tl.uint32)
    strip = strips + tl.program_id(0).to(tl.int64) * 2
    record = records + tl.load(strip).to(tl.int64) * WIDTH
    number = tl.load(strip + 1).to(tl.int64)
    n_rows = tl.load(record + N_ROWS)
    n_cols = tl.load(record + N_COLS)
    if SHARED:
        n_cols = tl.multiple_of(n_cols, 8)
    across = tl.cdiv(n_cols, BC * TURNS)
    r = number // across * BR + tl.arange(0, BR)[:, None]
    begin = number % across * (BC * TURNS)
    masks = tl.load(record + ROW_LIVE)
    flags = tl.load(masks.to(tl.pointer_type(tl.uint8)) + r, mask=r < present(masks, n_rows), other=1)
    live = (r < n_rows) & (flags != 0)
    if tl.max(tl.max(live.to(tl.int32), 1), 0) == 0:
        return
    listed = tl.load(record + ROWS)
    row = tl.load(listed.to(tl.pointer_type(tl.int64)) + r, mask=live & (r < present(listed, n_rows)), other=0)
    first = tl.where(listed != 0, row, r) * tl.load(record + ORIG_COLS)
    tensor_id = tl.load(record + TENSOR_ID).to(tl.uint32)
    if SHARED:
        params = tl.multiple_of(tl.load(record + PARAM).to(tl.pointer_type(WORD)), 16) + r * n_cols
    else:
        params = tl.load(record + PARAM).to(tl.pointer_type(WORD)) + r * n_cols
        masks = tl.load(record + COL_LIVE)
        column_flags = masks.to(tl.pointer_type(tl.uint8))
        masked_columns = present(masks, n_cols)
        columns = tl.load(record + COLS)
        listed_columns = present(columns, n_cols)
        own_columns = columns.to(tl.pointer_type(tl.int64)) + r // tl.load(record + GROUP_ROWS) * n_cols
    for turn in range(tl.minimum(tl.cdiv(n_cols - begin, BC), TURNS).to(tl.int32)):
        at = begin + turn * BC
        c = at + tl.arange(0, BC)[None, :]
        k = live & (c < n_cols)
        if SHARED:
            block = (first + at + 4 * tl.arange(0, BC // 4)[None, :]) >> 2
            w0, w1, w2, w3 = philox(seed, block, step, tensor_id)
            xi = tl.reshape(normals_of_blocks(w0, w1, w2, w3, MATHS), [BR, BC])
        else:
            k = k & (tl.load(column_flags + c, mask=c < masked_columns, other=1) != 0)
            column = tl.load(own_columns + c, mask=k & (c < listed_columns), other=0)
            element = first + tl.where(columns != 0, column, c)
            w0, w1, w2, w3 = philox(seed, element >> 2, step, tensor_id)
            xi = normals_of_elements(w0, w1, w2, w3, element, MATHS)
        # Two roundings, not a fused one: p + (sigma xi) is what plain PyTorch computes.
        p = tl.load(params + c, mask=k, other=0).to(MATHS) + std * xi
        if WORD == MATHS:
            tl.store(params + c, p, mask=k)
        else:
            top = -(1 << 63)
            if SHARED:
                block = (first + at + 8 * tl.arange(0, BC // 8)[None, :]) >> 3
                w0, w1, w2, w3 = philox(seed, block | top, step, tensor_id)
                bits = rounding_bits(w0, w1, w2, w3, BR, BC)
            else:
                w0, w1, w2, w3 = philox(seed, (element >> 3) | top, step, tensor_id)
                bits = rounding_bits_of(w0, w1, w2, w3, element)
            tl.store(params + c, stochastic(p, bits, WORD).to(WORD, bitcast=True), mask=k)


class Kind(NamedTuple):
    """What a launch of the kernel is compiled for."""

    word: tl.dtype
    shared: bool
    narrow: bool

    @property
    def tile(self) -> tuple[int, int]:
        """Rows and columns."""
        columns = NARROW if self.narrow else WIDE
        return 32 * WARPS * (SHARED_EACH if self.shared else OWN_EACH) // columns, columns

    def constants(self, on_device: bool) -> dict[str, Any]:
        rows, columns = self.tile
        return {
            "WORD": self.word, "MATHS": maths(self.word), "SHARED": self.shared, "ON_DEVICE": on_device,
            "BR": rows, "BC": columns,
        }  # fmt: skip


KINDS = [Kind(word, shared, narrow) for word in WORDS.values() for shared in (True, False) for narrow in (False, True)]


@dataclass
class Table:
    """Where a list of tensors lies, on the device; ``launches``: kind -> strips, int32 ``[n, 2]``: record, number."""

    records: Tensor
    launches: dict[Kind, Tensor]
    keep: list[Tensor]
    captured: bool = False


_MOST_TABLES = 16
_tables: dict[tuple[object, ...], Table] = {}
_captured: list[Table] = []
"""Tables that a CUDA graph reads: they stay for as long as the process lives."""


def _refuse(message: str) -> None:
    raise RuntimeError(f"demp_update_: {message}")


def _check_list(i: int, name: str, t: Tensor | None, dtype: torch.dtype, size: int, p: Tensor) -> int:
    """Address of an optional list, 0 without one."""
    if t is None:
        return 0
    if t.dtype != dtype or t.numel() != size or not t.is_contiguous() or t.device != p.device:
        _refuse(f"{name}[{i}] must be contiguous {dtype} with {size} entries on {p.device}")
    return t.data_ptr()


def _record(
    i: int,
    p: Tensor,
    row_live: Tensor | None,
    col_live: Tensor | None,
    rows: Tensor | None,
    cols: Tensor | None,
    orig_cols: int,
    tensor_id: int,
) -> list[int]:
    """The record of a parameter, as ``[1, n]`` where it has one column: its lanes are then side by side."""
    n_rows = p.shape[0] if p.dim() else 1
    n_cols = p.numel() // n_rows if n_rows else 0
    groups = cols.shape[0] if cols is not None and cols.dim() == 2 else 1
    if p.dtype not in WORDS or not p.is_contiguous():
        _refuse(f"params[{i}] must be contiguous float32, float64, bfloat16 or float16, is {p.dtype}")
    if groups == 0 or n_rows % groups:
        _refuse(f"cols[{i}] has {groups} lines, which do not divide {n_rows} rows")
    if cols is None and n_cols > orig_cols:
        _refuse(f"orig_cols[{i}] = {orig_cols} is less than the {n_cols} columns of params[{i}]")
    if not 0 <= tensor_id < 2**32:
        _refuse(f"tensor_ids[{i}] = {tensor_id} lies outside [0, 2^32)")
    lists = [
        _check_list(i, "row_live", row_live, torch.uint8, n_rows, p),
        _check_list(i, "col_live", col_live, torch.uint8, n_cols, p),
        _check_list(i, "rows", rows, torch.int64, n_rows, p),
        _check_list(i, "cols", cols, torch.int64, groups * n_cols, p),
    ]
    if n_cols == 1 and orig_cols == 1 and cols is None:
        lists, n_rows, n_cols = [lists[1], lists[0], 0, lists[2]], 1, n_rows
    return [p.data_ptr(), *lists, n_rows, n_cols, orig_cols, max(1, n_rows // groups), tensor_id]


def _kind(record: Sequence[int], dtype: torch.dtype) -> Kind:
    address, _, col_live, rows, cols, n_rows, n_cols, orig_cols = record[:8]
    blocks = n_cols % 8 == 0 and ((n_rows == 1 and rows == 0) or orig_cols % 8 == 0)
    shared = blocks and address % 16 == 0 and col_live == cols == 0
    return Kind(WORDS[dtype], shared, n_cols <= 2 * NARROW)


def _build(records: list[list[int]], kinds: list[Kind], device: torch.device) -> Table:
    keep: list[Tensor] = []
    launches: dict[Kind, Tensor] = {}
    for kind in KINDS:
        of = [i for i, k in enumerate(kinds) if k == kind and records[i][N_ROWS.value] and records[i][N_COLS.value]]
        if not of:
            continue
        height, width = kind.tile
        counts = torch.tensor(
            [
                math.prod(
                    -(-records[i][n.value] // size) for n, size in ((N_ROWS, height), (N_COLS, width * TURNS.value))
                )
                for i in of
            ]
        )
        total = int(counts.sum())
        if total >= 2**31:
            raise OverflowError("torsion: more than 2^31 strips in one list of parameters")
        first = counts.cumsum(0) - counts
        record = torch.repeat_interleave(torch.tensor(of), counts)
        number = torch.arange(total) - first.repeat_interleave(counts)
        launches[kind] = _send(torch.stack((record, number), 1).to(torch.int32), device, keep)
    return Table(_send(torch.tensor(records, dtype=torch.int64), device, keep), launches, keep)


def _table(records: list[list[int]], dtypes: Sequence[torch.dtype], device: torch.device) -> Table:
    """The table of these records, from the cache where nothing has moved."""
    key = (device, *dtypes, *map(tuple, records))
    table = _tables.get(key)
    if table is None:
        while len(_tables) >= _MOST_TABLES:
            del _tables[next(iter(_tables))]
        kinds = [_kind(record, dtype) for record, dtype in zip(records, dtypes, strict=True)]
        table = _tables[key] = _build(records, kinds, device)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing() and not table.captured:
        table.captured = True
        _captured.append(table)
    return table


def demp_update_(
    params: Sequence[Tensor],
    row_live: Sequence[Tensor | None],
    col_live: Sequence[Tensor | None],
    rows: Sequence[Tensor | None],
    cols: Sequence[Tensor | None],
    orig_cols: Sequence[int],
    sigma: float,
    seed: int,
    step: int,
    tensor_ids: Sequence[int],
    numbers: Tensor | None = None,
) -> None:
    """Adds DemP's noise to the live entries of a list of tensors; see :func:`torsion.ops.demp_update_`.

    Args:
        params: of one device.
        row_live: see there, as ``col_live``, ``rows``, ``cols``, ``orig_cols`` and ``tensor_ids``.
        col_live: see there.
        rows: see there.
        cols: see there.
        orig_cols: see there.
        sigma: see there.
        seed: 64 bits, as an int64.
        step: in [0, 2^32).
        tensor_ids: see there.
        numbers: float64 ``[2]`` beside the parameters: sigma and step, instead of those above.
    """
    lists = (row_live, col_live, rows, cols, orig_cols, tensor_ids)
    if any(len(x) != len(params) for x in lists):
        _refuse(f"lists differ in length: {len(params)} params, then {[len(x) for x in lists]}")
    if not params:
        return
    device = check_device("demp_update_", *params)
    if not 0 <= step < 2**32:
        _refuse(f"step = {step} lies outside [0, 2^32)")
    if numbers is not None and (
        numbers.dtype != torch.float64
        or numbers.numel() != 2
        or not numbers.is_contiguous()
        or numbers.device != device
    ):
        _refuse(f"numbers must be two contiguous float64 on {device}, is {numbers.dtype} {list(numbers.shape)}")
    records = [_record(i, p, *own) for i, (p, *own) in enumerate(zip(params, *lists, strict=True))]
    if numbers is None and sigma == 0:
        return
    with torch.no_grad(), on(device):
        table = _table(records, [p.dtype for p in params], device)
        for kind, strips in table.launches.items():
            noise_kernel[(len(strips),)](
                table.records, strips, table.records if numbers is None else numbers,
                struct.unpack("q", struct.pack("d", sigma))[0], seed, step, **kind.constants(numbers is not None),
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip


def audit_cases() -> Iterator[dict[str, Any]]:
    """What to compile without a GPU; see :func:`torsion.triton_kernels.engine.audit_cases`."""
    for kind in KINDS:
        if kind.narrow and kind.word != tl.float32:
            continue  # differs in the shape of the tile alone
        name = f"noise {kind.word} {'shared blocks' if kind.shared else 'own blocks'}{' narrow' if kind.narrow else ''}"
        yield case(
            name,
            noise_kernel,
            kind.constants(False),
            {"records": "*i64", "strips": "*i32", "numbers": "*i64"},
            scalars={"sigma": "i64", "seed": "i64", "step": "i64"},
        )
    yield case(
        "noise fp32 shared blocks, numbers on the device",
        noise_kernel,
        Kind(tl.float32, True, False).constants(True),
        {"records": "*i64", "strips": "*i32", "numbers": "*fp64"},
        scalars={"sigma": "i64", "seed": "i64", "step": "i64"},
    )
