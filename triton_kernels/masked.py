"""A linear layer on its live units in one pass: gather, product, bias, activation and scatter (arXiv 2403.07688).

    y[:, out_j] = act(sum_k x[:, in_k] W[out_j, in_k] + b[out_j]),   y[:, dead] = 0

M rows, K' live inputs of K, N' live outputs of N, s bytes a number: reads s (M K' + N' K' + N') and 4 (K' + N') of
lists; writes s M N', or s M N at full width, and for ReLU a bit for each live output, for GELU and SiLU s M N' of z.
Where live inputs are scattered, whole sectors of 32 bytes travel: with half of them live, all of x. What is dead is
used nowhere. Sums in float32; float32 operands in full precision, unless torch is set to allow TensorFloat-32.
Addresses are 64-bit.

Index lists are trusted: ascending, without repetitions, in range. For layers that torch can take as views, its own
product is the better one; this is for boundaries whose units cannot be reordered.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .engine import INTERPRETED, WARPS, on
from .normals import WORDS, case, check_device
from .storage import nearest

ACTIVATIONS = ("none", "relu", "gelu", "silu")
# Rows of x, live outputs and live inputs of a tile. Without tensor cores a thread holds operands in registers.
HALF_TILE, FLOAT_TILE = (128, 64, 32), (64, 64, 32)
# Columns that are zeroed at a time: as many as leave registers to the rest.
ZEROS = tl.constexpr(32)
# Row tiles whose programs run close together, so that the weights they share are still in the cache.
GROUP = tl.constexpr(8)
PACKED = 4096  # bits a program packs


@triton.jit
def pack_bits(on, WIDTH: tl.constexpr, HEIGHT: tl.constexpr):
    """``[HEIGHT, WIDTH]`` truth values as ``[HEIGHT, WIDTH / 8]`` bytes, the first in the lowest bit."""
    bits = tl.reshape(on.to(tl.int32), [HEIGHT, WIDTH // 8, 8])
    return tl.sum(bits << tl.arange(0, 8)[None, None, :], 2).to(tl.uint8)


@triton.jit
def linear_kernel(
    x, w, bias, in_idx, out_idx, y, saved, n_rows, n_in, n_out, width, s_x, s_w,
    HAS_BIAS: tl.constexpr, PICK_X: tl.constexpr, PICK_W: tl.constexpr, PICK_ROWS: tl.constexpr, SPREAD: tl.constexpr,
    ACT: tl.constexpr, SAVE: tl.constexpr, WORD: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """A tile of live outputs.

    PICK_X, PICK_W: columns are those of ``in_idx``. PICK_ROWS: rows of the weight are those of ``out_idx``. SPREAD: y
    has all of its ``width`` columns. SAVE: "bits", "z" or "". WIDEN: the interpreter's product of 16-bit numbers is
    wrong.
    """
    pid = tl.program_id(0)
    across = tl.cdiv(n_out, BN)
    first_row = pid // (GROUP * across) * GROUP
    in_group = tl.minimum(tl.cdiv(n_rows, BM) - first_row, GROUP)
    m = (first_row + pid % (GROUP * across) % in_group).to(tl.int64) * BM + tl.arange(0, BM)
    tile = pid % (GROUP * across) // in_group
    j = tile * BN + tl.arange(0, BN)
    is_row = (m < n_rows)[:, None]
    is_out = j < n_out
    unit = j
    if PICK_ROWS or SPREAD:
        unit = tl.load(out_idx + j, mask=is_out, other=0)
    if SPREAD:
        # Zeros from this tile's first live column to the next one's, under the live ones too: in the cache they cost
        # little, and no list of the dead is needed. The barrier brings the live ones after them.
        begin = tl.where(tile == 0, 0, tl.load(out_idx + tile * BN))
        last = tile + 1 == across
        end = tl.where(last, width, tl.load(out_idx + tl.where(last, 0, (tile + 1) * BN)))
        zeros = tl.zeros([BM, ZEROS], tl.float32).to(WORD)
        for at in range(begin, end, ZEROS):
            c = at + tl.arange(0, ZEROS)
            tl.store(y + m[:, None] * width + c[None, :], zeros, mask=is_row & (c < end)[None, :])
        tl.debug_barrier()
    of_x = x + m[:, None] * s_x
    of_w = w + unit.to(tl.int64)[None, :] * s_w
    z = tl.zeros([BM, BN], tl.float32)
    for at in range(0, n_in, BK):
        k = at + tl.arange(0, BK)
        is_in = k < n_in
        column = k
        if PICK_X or PICK_W:
            column = tl.load(in_idx + k, mask=is_in, other=0)
        column_x = column if PICK_X else k
        column_w = column if PICK_W else k
        a = tl.load(of_x + column_x[None, :], mask=is_row & is_in[None, :], other=0)
        b = tl.load(of_w + column_w[:, None], mask=is_in[:, None] & is_out[None, :], other=0)
        if WIDEN:
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        z = tl.dot(a, b, z, input_precision=PRECISION)
    if HAS_BIAS:
        z += tl.load(bias + unit, mask=is_out, other=0).to(tl.float32)[None, :]
    k = is_row & is_out[None, :]
    live = m[:, None] * n_out + j[None, :]  # among the live
    if SAVE == "z":
        store(saved + live, z, k, WORD)
    if ACT == "relu":
        z = tl.where(z <= 0, 0.0, z)  # NaN stays
    elif ACT == "gelu":
        z = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACT == "silu":
        z = z / (1.0 + tl.exp(-z))
    if SPREAD:
        store(y + m[:, None] * width + unit[None, :], z, k, WORD)
    else:
        store(y + live, z, k, WORD)
    if SAVE == "bits":
        on = (rounded(z, WORD) <= 0) == 0
        byte = tile * (BN // 8) + tl.arange(0, BN // 8)
        tl.store(saved + m[:, None] * (n_out // 8) + byte[None, :], pack_bits(on, BN, BM),
                 mask=is_row & (byte < n_out // 8)[None, :])  # fmt: skip


@triton.jit
def store(to, value, k, WORD: tl.constexpr):
    if WORD == tl.float32:
        tl.store(to, value, mask=k)
    else:
        tl.store(to, nearest(value, WORD).to(WORD, bitcast=True), mask=k)


@triton.jit
def rounded(value, WORD: tl.constexpr):
    """As it reads once it is stored."""
    if WORD == tl.float32:
        return value
    else:
        return nearest(value, WORD).to(WORD, bitcast=True).to(tl.float32)


@triton.jit
def bits_kernel(y, out_idx, saved, n_bits, n_out, width, SPREAD: tl.constexpr, BLOCK: tl.constexpr):
    """The bits of ReLU from its result, for rows of the live that are no whole number of bytes."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    k = i < n_bits
    place = i
    if SPREAD:
        place = i // n_out * width + tl.load(out_idx + i % n_out, mask=k, other=0)
    on = (tl.load(y + place, mask=k, other=0).to(tl.float32) <= 0) == 0
    byte = tl.program_id(0).to(tl.int64) * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
    packed = tl.reshape(pack_bits(tl.reshape(on, [1, BLOCK]), BLOCK, 1), [BLOCK // 8])
    tl.store(saved + byte, packed, mask=byte * 8 < n_bits)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_idx: Tensor | None, out_idx: Tensor | None, act: str,
    x_compact: bool,
) -> None:  # fmt: skip
    def need(fits: bool, what: str) -> None:
        if not fits:
            raise RuntimeError(f"masked_linear: {what}")

    need(act in ACTIVATIONS, f"act={act!r} is none of {', '.join(ACTIVATIONS)}")
    need(weight.dim() == 2 and x.dim() >= 1, "weight must be [N, K] and x [..., K]")
    dtypes = {t.dtype for t in (x, weight, bias) if t is not None}
    need(
        len(dtypes) == 1 and x.dtype in WORDS and x.dtype != torch.float64,
        f"Triton takes float32, bfloat16 or float16, one of them for all, not {', '.join(sorted(map(str, dtypes)))}",
    )
    for name, t, size in (("in_idx", in_idx, weight.shape[1]), ("out_idx", out_idx, weight.shape[0])):
        fits = t is None or (t.dtype == torch.int32 and t.dim() == 1 and t.is_contiguous() and t.numel() <= size)
        need(fits, f"{name} must be contiguous int32 with at most {size} entries")
    columns = in_idx.shape[0] if x_compact and in_idx is not None else weight.shape[1]
    need(x.shape[-1] == columns, f"x has {x.shape[-1]} columns, must have {columns}")
    need(bias is None or bias.shape == weight.shape[:1], "bias must be [N]")


def _by_rows(t: Tensor) -> Tensor:
    """As ``[rows, columns]`` with the numbers of a row side by side."""
    t = t.reshape(-1, t.shape[-1]) if t.dim() != 2 else t
    return t if t.stride(1) == 1 or t.shape[1] == 1 else t.contiguous()


def masked_linear_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, in_idx: Tensor | None, out_idx: Tensor | None, act: str,
    x_compact: bool, y_compact: bool, save: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What the op ``masked_linear_forward`` computes, fused; dead entries of x and weight are not read.

    Args:
        x: ``[..., K]``, with ``x_compact`` ``[..., K']``; float32, bfloat16 or float16.
        weight: ``[N, K]``, of the same dtype.
        bias: ``[N]``, or None.
        in_idx: int32 ``[K']``, ascending, unique and in range, which is not looked into; None: all.
        out_idx: int32 ``[N']``, likewise.
        act: "none", "relu", "gelu" or "silu".
        x_compact: x holds the live inputs only.
        y_compact: return the live outputs only.
        save: whether a backward may come.

    Returns:
        y, ``[..., N]`` or ``[..., N']``, and what the backward needs: for ReLU (also without ``save``) uint8
        ``[ceil(M N' / 8)]``, bit i & 7 of byte i >> 3 set where live output i, row by row, is above 0 or NaN; for GELU
        and SiLU z ``[M, N']``; else nothing. Activations are taken of sums that are not rounded to the dtype.
    """
    _check(x, weight, bias, in_idx, out_idx, act, x_compact)
    device = check_device("masked_linear", x, weight, bias, in_idx, out_idx)
    (n, n_in), word = weight.shape, WORDS[x.dtype]
    # Of a list that is ascending and as long as the axis, nothing need be read.
    in_idx = None if in_idx is None or in_idx.shape[0] == n_in else in_idx
    out_idx = None if out_idx is None or out_idx.shape[0] == n else out_idx
    n_in = n_in if in_idx is None else in_idx.shape[0]
    n_out = n if out_idx is None else out_idx.shape[0]
    spread = out_idx is not None and not y_compact
    n_rows = x.numel() // x.shape[-1] if x.shape[-1] else x.shape[:-1].numel()
    width = n if spread else n_out
    y = x.new_empty(*x.shape[:-1], width) if n_out else x.new_zeros(*x.shape[:-1], n if not y_compact else 0)
    wants = "bits" if act == "relu" else "z" if save and act != "none" else ""
    if wants == "bits":
        saved = x.new_empty((n_rows * n_out + 7) // 8, dtype=torch.uint8)
    else:
        saved = x.new_empty((n_rows, n_out) if wants else 0)
    if not n_rows or not n_out:
        return y, saved
    rows, weight = _by_rows(x.reshape(n_rows, x.shape[-1])), _by_rows(weight)
    halves = x.dtype != torch.float32
    height, across, depth = HALF_TILE if halves else FLOAT_TILE
    whole_bytes = n_out % 8 == 0
    nothing = rows  # an address for lists that are not there
    exact = torch.get_float32_matmul_precision() == "highest"
    with torch.no_grad(), on(device):
        linear_kernel[(triton.cdiv(n_rows, height) * triton.cdiv(n_out, across),)](
            rows, weight, nothing if bias is None else bias.contiguous(), nothing if in_idx is None else in_idx,
            nothing if out_idx is None else out_idx, y, saved, n_rows, n_in, n_out, n, rows.stride(0), weight.stride(0),
            HAS_BIAS=bias is not None, PICK_X=in_idx is not None and not x_compact, PICK_W=in_idx is not None,
            PICK_ROWS=out_idx is not None, SPREAD=spread, ACT=act,
            SAVE=wants if wants != "bits" or whole_bytes else "", WORD=word,
            PRECISION="ieee" if exact and not halves else "tf32", WIDEN=INTERPRETED and halves,
            BM=height, BN=across, BK=depth, num_warps=WARPS if halves else 4, enable_fp_fusion=True,
        )  # fmt: skip
        if wants == "bits" and not whole_bytes:
            bits_kernel[(triton.cdiv(n_rows * n_out, PACKED),)](
                y, out_idx if spread else nothing, saved, n_rows * n_out, n_out, n, SPREAD=spread, BLOCK=PACKED,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
    return y, saved


def audit_cases() -> Iterator[dict[str, Any]]:
    """What to compile without a GPU; see :func:`torsion.triton_kernels.engine.audit_cases`."""
    sizes = dict.fromkeys(("n_rows", "n_in", "n_out", "width", "s_x", "s_w"), "i32")
    picks = {
        "": dict.fromkeys(("PICK_X", "PICK_W", "PICK_ROWS", "SPREAD"), True),
        " compact": {"PICK_X": False, "PICK_W": True, "PICK_ROWS": True, "SPREAD": False},
        " live inputs": {"PICK_X": True, "PICK_W": True, "PICK_ROWS": False, "SPREAD": False},
        " live outputs": {"PICK_X": False, "PICK_W": False, "PICK_ROWS": True, "SPREAD": True},
    }
    cases = [(word, "relu", pick) for word in (tl.bfloat16, tl.float32) for pick in picks]
    cases += [(tl.float16, "relu", ""), (tl.float32, "gelu", ""), *((tl.bfloat16, a, "") for a in ACTIVATIONS[2:])]
    for word, act, pick in [*cases, (tl.bfloat16, "none", "")]:
        saved = {"relu": "bits", "none": ""}.get(act, "z")
        height, across, depth = FLOAT_TILE if word == tl.float32 else HALF_TILE
        yield case(
            f"linear {word} {act}{pick}",
            linear_kernel,
            {
                "HAS_BIAS": True, **picks[pick], "ACT": act, "SAVE": saved, "WORD": word, "WIDEN": False,
                "PRECISION": "ieee" if word == tl.float32 else "tf32", "BM": height, "BN": across, "BK": depth,
            },
            {
                **dict.fromkeys(("x", "w", "bias", "y"), f"*{word}"), "in_idx": "*i32", "out_idx": "*i32",
                "saved": "*u8" if saved == "bits" else f"*{word}",
            },
            scalars=sizes,
            aligned=("n_in", "n_out", "width", "s_x", "s_w"),
            num_warps=4 if word == tl.float32 else WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
    for word, spread in ((tl.bfloat16, True), (tl.float32, False)):
        yield case(
            f"linear bits {word}{' of full width' if spread else ''}",
            bits_kernel,
            {"SPREAD": spread, "BLOCK": PACKED},
            {"y": f"*{word}", "out_idx": "*i32", "saved": "*u8"},
            scalars={"n_bits": "i64", "n_out": "i32", "width": "i32"},
        )
