"""Rounding to storage, bit for bit that of ``csrc/engine/types.h``.

Values are widened by a plain cast, which is exact. They are narrowed by integer arithmetic: the interpreter's own
rounding to bfloat16 is wrong, and the GPU's instructions differ from the CPU runner in their NaN. Both functions return
the bits, uint16; WORD is the storage type.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def nearest(x, WORD: tl.constexpr):
    """Bits of the float32 ``x`` rounded to nearest, ties to even."""
    u = x.to(tl.uint32, bitcast=True)
    magnitude = u & 0x7FFFFFFF
    if WORD == tl.bfloat16:
        rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        half = tl.where(magnitude > 0x7F800000, 0x7FC0, rounded)
    else:
        # Below 2^-14 the half is subnormal: adding 0.5 leaves its multiple of 2^-24 in the low bits, rounded to even.
        shifted = magnitude.to(tl.float32, bitcast=True) + 0.5
        subnormal = shifted.to(tl.uint32, bitcast=True) - 0x3F000000
        normal = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13
        half = tl.where(magnitude < 0x38800000, subnormal, normal)
        half = tl.where(magnitude >= 0x477FF000, 0x7C00, half)
        half = ((u >> 16) & 0x8000) | tl.where(magnitude > 0x7F800000, 0x7E00, half)
    return half.to(tl.uint16)


@triton.jit
def stochastic(x, noise, WORD: tl.constexpr):
    """Bits of the float32 ``x`` rounded up or down at random; noise: 16 random bits for each element."""
    u = x.to(tl.uint32, bitcast=True)
    magnitude = u & 0x7FFFFFFF
    if WORD == tl.bfloat16:
        # Bits below the last place kept, then truncation; Inf and NaN must not carry into the exponent.
        special = tl.where(magnitude > 0x7F800000, 0x7FC0, u >> 16)
        half = tl.where(magnitude >= 0x7F800000, special, (u + noise) >> 16)
    else:
        bits = noise & 0x1FFF
        # Subnormal halves are multiples of 2^-24; 13 random bits below that place are all a normal half has to spare.
        steps = magnitude.to(tl.float32, bitcast=True) * 16777216.0 + bits.to(tl.float32) * (1.0 / 8192)
        subnormal = tl.where(magnitude < 0x38800000, steps, 0.0).to(tl.uint32)
        half = tl.where(magnitude < 0x38800000, subnormal, (magnitude - 0x38000000 + bits) >> 13)
        half = tl.where((magnitude >= 0x47800000) | (half > 0x7C00), 0x7C00, half)
        half = ((u >> 16) & 0x8000) | tl.where(magnitude > 0x7F800000, 0x7E00, half)
    return half.to(tl.uint16)
