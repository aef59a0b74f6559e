"""Storage types and their conversions, bit for bit those of ``csrc/engine/types.h``.

bfloat16 and float16 travel as uint16 and are rounded by integer arithmetic: the interpreter's arithmetic on bfloat16 is
wrong, and conversion instructions differ from the CPU runner in their NaN. KIND names parameter and gradient storage
("f32", "f64", "bf16", "f16"); the maths and the state are float64 for "f64", else float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def widen(x, KIND: tl.constexpr):
    """A loaded value in the type of the maths."""
    if KIND == "bf16":
        return (x.to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    elif KIND == "f16":
        return x.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return x


@triton.jit
def nearest(x, KIND: tl.constexpr):
    """``x`` in storage, rounded to nearest, ties to even."""
    if KIND == "bf16":
        u = x.to(tl.uint32, bitcast=True)
        rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16
        return tl.where((u & 0x7FFFFFFF) > 0x7F800000, 0x7FC0, rounded).to(tl.uint16)
    elif KIND == "f16":
        u = x.to(tl.uint32, bitcast=True)
        magnitude = u & 0x7FFFFFFF
        # Below 2^-14 the half is subnormal: adding 0.5 leaves its multiple of 2^-24 in the low bits, rounded to even.
        shifted = magnitude.to(tl.float32, bitcast=True) + 0.5
        subnormal = shifted.to(tl.uint32, bitcast=True) - 0x3F000000
        normal = (magnitude - 0x38000000 + 0xFFF + ((magnitude >> 13) & 1)) >> 13
        half = tl.where(magnitude < 0x38800000, subnormal, normal)
        half = tl.where(magnitude >= 0x477FF000, 0x7C00, half)
        half = tl.where(magnitude > 0x7F800000, 0x7E00, half)
        return (((u >> 16) & 0x8000) | half).to(tl.uint16)
    else:
        return x


@triton.jit
def stochastic(x, noise, KIND: tl.constexpr):
    """``x`` in storage, rounded up or down at random; noise: 16 random bits for each element."""
    u = x.to(tl.uint32, bitcast=True)
    if KIND == "bf16":
        # Bits below the last place kept, then truncation; Inf and NaN must not carry into the exponent.
        truncated = ((u + noise) >> 16).to(tl.uint16)
        return tl.where((u & 0x7F800000) == 0x7F800000, nearest(x, KIND), truncated)
    else:
        magnitude = u & 0x7FFFFFFF
        bits = noise & 0x1FFF
        # Subnormal halves are multiples of 2^-24; 13 random bits below that place are all a normal half has to spare.
        steps = magnitude.to(tl.float32, bitcast=True) * 16777216.0 + bits.to(tl.float32) * (1.0 / 8192)
        subnormal = tl.where(magnitude < 0x38800000, steps, 0.0).to(tl.uint32)
        normal = (magnitude - 0x38000000 + bits) >> 13
        half = tl.where(magnitude < 0x38800000, subnormal, normal)
        half = tl.where((magnitude >= 0x47800000) | (half > 0x7C00), 0x7C00, half)
        half = tl.where(magnitude > 0x7F800000, 0x7E00, half)
        return (((u >> 16) & 0x8000) | half).to(tl.uint16)
