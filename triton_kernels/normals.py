"""Standard normals that belong to elements, bit for bit those of ``csrc/rules/philox_normal.h``.

    (x0, x1, x2, x3) = Philox(seed; e >> 2, step, tensor_id)      e: number of the element in the uncut tensor
    xi = r cos(2 pi u2) or r sin(2 pi u2), r = sqrt(-2 ln u1)     pairs (x0, x1), (x2, x3); e & 3 says which of four
    u  = (x + 1/2) 2^-32, for float32 (x >> 9 + 1/2) 2^-23

About 25 integer operations of Philox an element where four neighbours share a block, 100 where each makes its own.
:func:`philox_normal_` writes its tensor once (float32: 4 bytes an element); inside another kernel normals move nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .engine import INTERPRETED, WARPS, on
from .philox import philox
from .storage import nearest
from .table import KINDS, Kind

WORDS = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# A thread has eight elements: a block of rounding bits, or two of normals.
BLOCK = 4096 if INTERPRETED else 2048


@triton.jit
def fused(a, b, c: tl.constexpr):
    """``a b + c`` in float64, rounded once. Triton 3.6 would round a plain number to float32 on its way into tl.fma."""
    return tl.fma(a, b, tl.full([], c, tl.float64))


@triton.jit
def polar(a, b, MATHS: tl.constexpr):
    """Radius and angle of the words ``a`` and ``b``: r; quarter turns q; sine and cosine of what is left of the angle.

    The polynomials are those of the C++, fused where it fuses: compile with enable_fp_fusion=False.
    """
    if MATHS == tl.float64:
        # fdlibm's logarithm and kernels of sine and cosine; u is 2^33 times the uniform number.
        u = a.to(tl.int64) * 2 + 1
        bits = u.to(tl.float64).to(tl.int64, bitcast=True) + (0x3FF0000000000000 - 0x3FE6A09E667F3BCD)
        e = ((bits >> 52) - (1023 + 33)).to(tl.float64)
        f = ((bits & 0xFFFFFFFFFFFFF) + 0x3FE6A09E667F3BCD).to(tl.float64, bitcast=True) - 1.0
        s = f / (f + 2.0)
        z = s * s
        half = f * 0.5 * f
        p = fused(tl.full(z.shape, 1.479819860511658591e-1, tl.float64), z, 1.531383769920937332e-1)
        p = fused(p, z, 1.818357216161805012e-1)
        p = fused(p, z, 2.222219843214978396e-1)
        p = fused(p, z, 2.857142874366239149e-1)
        p = fused(p, z, 3.999999999940941908e-1)
        p = fused(p, z, 6.666666666666735130e-1)
        low = tl.fma(s, tl.fma(p, z, half), e * 1.90821492927058770002e-10)
        r = tl.sqrt(tl.fma(e, tl.full(e.shape, 6.93147180369123816490e-1, tl.float64), f - (half - low)) * -2.0)
        u = b.to(tl.int64) * 2 + 1
        quarters = (u + (1 << 30)) >> 31
        x = (u - (quarters << 31)).to(tl.float64) * (1.57079632679489661923 / (1 << 31))
        z = x * x
        half = z * 0.5
        w = 1.0 - half
        s = fused(tl.full(z.shape, 1.58969099521155010221e-10, tl.float64), z, -2.50507602534068634195e-8)
        s = fused(s, z, 2.75573137070700676789e-6)
        s = fused(s, z, -1.98412698298579493134e-4)
        s = fused(s, z, 8.33333333332248946124e-3)
        s = tl.fma(fused(s, z, -1.66666666666666324348e-1), z * x, x)
        c = fused(tl.full(z.shape, -1.13596475577881948265e-11, tl.float64), z, 2.08757232129817482790e-9)
        c = fused(c, z, -2.75573143513906633035e-7)
        c = fused(c, z, 2.48015872894767294178e-5)
        c = fused(c, z, -1.38888888888741095749e-3)
        c = fused(c, z, 4.16666666666666019037e-2)
        c = w + ((1.0 - w - half) + z * (z * c))
        return r, quarters.to(tl.uint32), s, c
    else:
        # Polynomials of our own fit; u is 2^24 times the uniform number, odd, and 2^e (1 + f) with 1 + f in [3/4, 3/2).
        u = ((a >> 8) | 1).to(tl.int32)
        bits = u.to(tl.float32).to(tl.int32, bitcast=True) + (0x3F800000 - 0x3F400000)
        e = ((bits >> 23) - (127 + 24)).to(tl.float32)
        f = ((bits & 0x7FFFFF) + 0x3F400000).to(tl.float32, bitcast=True) - 1.0
        p = tl.fma(f, -1.08265057e-1, 2.41347428e-1)
        p = tl.fma(p, f, -2.99678308e-1)
        p = tl.fma(p, f, 3.36456219e-1)
        p = tl.fma(p, f, -3.99541546e-1)
        p = tl.fma(p, f, 4.99868846e-1)
        p = tl.fma(p, f, -6.66670971e-1)
        p = tl.fma(p, f, 1.00000121)
        p = tl.fma(p, f, -2.0)
        r = tl.sqrt_rn(tl.fma(p, f, e * -1.38629436))  # plain sqrt is approximate in float32
        # In 32 bits to the turn: quarter turns, rounded, are the top two of a sum, what is left the rest with its sign.
        angle = ((b >> 8) | 1).to(tl.uint32) << 8
        quarters = (angle + (1 << 29)) >> 30
        x = (angle << 2).to(tl.int32, bitcast=True).to(tl.float32) * (1.57079633 / (1 << 32))
        z = x * x
        s = tl.fma(z, -1.95172987e-4, 8.33217814e-3)
        s = tl.fma(tl.fma(s, z, -1.66666549e-1), z * x, x)
        c = tl.fma(z, -1.35918525e-3, 4.16557769e-2)
        c = tl.fma(tl.fma(c, z, -4.99998847e-1), z, 1.0)
        return r, quarters, s, c


@triton.jit
def cosine_of(q, s, c, MATHS: tl.constexpr):
    """Cosine of q quarter turns more than an angle whose sine and cosine are s and c; with q + 3, the sine."""
    x = tl.where((q & 1) != 0, s, c)
    flip = (q + 1) & 2
    if MATHS == tl.float64:
        return (x.to(tl.uint64, bitcast=True) ^ (flip.to(tl.uint64) << 62)).to(tl.float64, bitcast=True)
    else:
        return (x.to(tl.uint32, bitcast=True) ^ (flip << 30)).to(tl.float32, bitcast=True)


@triton.jit
def normals_of_blocks(w0, w1, w2, w3, MATHS: tl.constexpr):
    """The four normals of each block: the shape of the words, and behind it ``[2, 2]``, which counts fastest."""
    r, q, s, c = polar(w0, w1, MATHS)
    t, p, u, d = polar(w2, w3, MATHS)
    # The dimension joined last counts fastest: [pair, cosine or sine].
    even = tl.join(r * cosine_of(q, s, c, MATHS), t * cosine_of(p, u, d, MATHS))
    odd = tl.join(r * cosine_of(q + 3, s, c, MATHS), t * cosine_of(p + 3, u, d, MATHS))
    return tl.join(even, odd)


@triton.jit
def normals_of_elements(w0, w1, w2, w3, element, MATHS: tl.constexpr):
    """One normal for each element, of whose block these are the words."""
    lane = (element & 3).to(tl.uint32)
    second = (lane & 2) != 0
    r, q, s, c = polar(tl.where(second, w2, w0), tl.where(second, w3, w1), MATHS)
    return r * cosine_of(q + 3 * (lane & 1), s, c, MATHS)


@triton.jit(do_not_specialize=["seed", "step", "tensor_id"])
def normals_kernel(out, n, seed, step, tensor_id, WORD: tl.constexpr, MATHS: tl.constexpr, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    w0, w1, w2, w3 = philox(
        seed.to(tl.int64), (first >> 2) + tl.arange(0, BLOCK // 4), step.to(tl.uint32), tensor_id.to(tl.uint32)
    )
    x = tl.reshape(normals_of_blocks(w0, w1, w2, w3, MATHS), [BLOCK])
    i = first + tl.arange(0, BLOCK)
    if WORD == MATHS:
        tl.store(out + i, x, mask=i < n)
    else:
        tl.store(out + i, nearest(x, WORD).to(WORD, bitcast=True), mask=i < n)


def check_device(op: str, *tensors: Tensor | None) -> torch.device:
    """The device of the tensors, all of one; refuses those that Triton does not run on in this process."""
    devices = {t.device for t in tensors if t is not None}
    if len(devices) != 1:
        raise RuntimeError(f"{op}: tensors are on several devices: {', '.join(sorted(map(str, devices)))}")
    (device,) = devices
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        raise RuntimeError(
            f"{op}: Triton runs on CUDA tensors, and on CPU tensors alone with TRITON_INTERPRET=1 set before the first "
            f"import (slow, for tests); these are on {device}, and it is {'' if INTERPRETED else 'not '}set"
        )
    return device


def maths(word: tl.dtype) -> tl.dtype:
    """Type of the element maths."""
    return Kind(word, False).maths


def philox_normal_(out: Tensor, seed: int, step: int, tensor_id: int) -> None:
    """Fills ``out`` with standard normals; see :func:`torsion.ops.philox_normal`.

    Args:
        out: contiguous, float32, float64, bfloat16 or float16.
        seed: 64 bits, as an int64.
        step: in [0, 2^32).
        tensor_id: in [0, 2^32).
    """
    device = check_device("philox_normal", out)
    if out.dtype not in WORDS or not out.is_contiguous():
        raise RuntimeError(
            f"philox_normal: out must be contiguous float32, float64, bfloat16 or float16, is {out.dtype}"
        )
    n, word = out.numel(), WORDS[out.dtype]
    if n == 0:
        return
    with on(device):
        normals_kernel[(triton.cdiv(n, BLOCK),)](
            out, n, seed, step, tensor_id, WORD=word, MATHS=maths(word), BLOCK=BLOCK,
            num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip


def case(
    name: str, kernel: Any, constexprs: dict[str, Any], pointers: dict[str, str], *, scalars: dict[str, str],
    aligned: tuple[str, ...] = (), num_warps: int = WARPS, enable_fp_fusion: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A kernel to compile ahead of time; pointers, and the scalars in ``aligned``, are divisible by 16."""
    return {
        "name": name,
        "kernel": kernel,
        "signature": {**pointers, **scalars, **dict.fromkeys(constexprs, "constexpr")},
        "constexprs": constexprs,
        "aligned": [*pointers, *aligned],
        "num_warps": num_warps,
        "enable_fp_fusion": enable_fp_fusion,
    }


def audit_cases() -> Iterator[dict[str, Any]]:
    """What to compile without a GPU; see :func:`torsion.triton_kernels.engine.audit_cases`."""
    for kind in KINDS:
        if not kind.stochastic:
            yield case(
                f"normals {kind.word}",
                normals_kernel,
                {"WORD": kind.word, "MATHS": kind.maths, "BLOCK": BLOCK},
                {"out": f"*{kind.word}"},
                scalars={"n": "i64", "seed": "i64", "step": "i64", "tensor_id": "i64"},
                aligned=("n",),
            )
