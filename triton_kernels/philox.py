"""Philox4x32-10 (Salmon et al. 2011), bit for bit that of ``csrc/rules/philox.h``.

    key = seed, counter = (index, step, stream), four words of 32 bits a block

Stochastic rounding takes 16 bits an element, so block k serves the elements 8k ... 8k + 7 of a tensor: element e has
half ``e & 1`` of word ``(e >> 1) & 3`` of block ``e >> 3``. No memory is read or written.
"""

from __future__ import annotations

import triton
import triton.language as tl

_A = tl.constexpr(0xD2511F53)
_B = tl.constexpr(0xCD9E8D57)
_KEY_A = tl.constexpr(0x9E3779B9)
_KEY_B = tl.constexpr(0xBB67AE85)


@triton.jit
def philox(seed, index, step, stream):
    """Four uint32 words for each element of the int64 tensor ``index``; seed is an int64 scalar, the others uint32."""
    low = tl.full(index.shape, 0xFFFFFFFF, tl.uint64)
    index = index.to(tl.uint64)
    c0 = (index & low).to(tl.uint32)
    c1 = (index >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0) + step
    c3 = tl.zeros_like(c0) + stream
    seed = tl.zeros_like(index) + seed.to(tl.uint64)
    k0 = (seed & low).to(tl.uint32)
    k1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(10):
        a = c0.to(tl.uint64) * _A
        b = c2.to(tl.uint64) * _B
        c0 = (b >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = (b & low).to(tl.uint32)
        c3 = (a & low).to(tl.uint32)
        k0 += _KEY_A
        k1 += _KEY_B
    return c0, c1, c2, c3


@triton.jit
def noise_of_blocks(seed, first, step, stream, N: tl.constexpr):
    """16 bits for each of the N elements from ``first``, a multiple of 8: each block is made once, for its eight."""
    w0, w1, w2, w3 = philox(seed, (first >> 3) + tl.arange(0, N // 8), step, stream)
    # The dimension joined last counts fastest: [block, word >> 1, word & 1, half].
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [N])


@triton.jit
def noise_of_elements(seed, element, step, stream):
    """16 bits for each of the int64 numbers ``element``, wherever its block begins: eight times the work."""
    w0, w1, w2, w3 = philox(seed, element >> 3, step, stream)
    lane = (element & 7).to(tl.uint32)
    low = tl.where((lane & 2) != 0, w1, w0)
    high = tl.where((lane & 2) != 0, w3, w2)
    return (tl.where((lane & 4) != 0, high, low) >> (16 * (lane & 1))) & 0xFFFF
