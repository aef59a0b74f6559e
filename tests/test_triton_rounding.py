"""Rounding and random bits of the Triton kernels, bit by bit: Philox in Python integers, torch's own casts."""

from __future__ import annotations

import struct

import pytest
import torch
from helpers import same_bits
from torch import Tensor

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from torsion.triton_kernels import engine, storage  # noqa: E402
from torsion.triton_kernels.philox import noise_of_blocks, noise_of_elements, philox  # noqa: E402

pytestmark = [
    pytest.mark.triton,
    pytest.mark.backend("triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
DEVICE = "cpu" if engine.INTERPRETED else "cuda"
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def plain_philox(seed: int, index: int, step: int, stream: int) -> list[int]:
    """Salmon et al. 2011 in Python integers."""
    low = 0xFFFFFFFF
    c, k = [index & low, index >> 32, step, stream], [seed & low, seed >> 32]
    for _ in range(10):
        a, b = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
        c = [(b >> 32) ^ c[1] ^ k[0], b & low, (a >> 32) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
    return c


def plain_noise(n: int, seed: int, key: int, step: int, stream: int) -> Tensor:
    words = {b: plain_philox(seed, b, step, stream) for b in range(key >> 3, (key + n >> 3) + 1)}
    return torch.tensor([words[e >> 3][(e >> 1) & 3] >> 16 * (e & 1) & 0xFFFF for e in range(key, key + n)])


def down_or_up(x: Tensor, dtype: torch.dtype, noise: Tensor) -> Tensor:
    """The neighbours of x in ``dtype``: the one away from zero where noise exceeds what truncation leaves."""
    dropped = 16 if dtype == BF16 else 13
    bits = x.view(torch.int32).long()
    kept = bits >> dropped << dropped
    up = (noise & (1 << dropped) - 1) + (bits - kept) >= 1 << dropped
    return (kept + (up.long() << dropped)).to(torch.int32).view(F32).to(dtype)


@triton.jit
def _round_kernel(x, noise, near, random, WORD: tl.constexpr, N: tl.constexpr):
    i = tl.arange(0, N)
    value = tl.load(x + i).to(tl.float32, bitcast=True)
    tl.store(near + i, storage.nearest(value, WORD).to(tl.int32))
    tl.store(random + i, storage.stochastic(value, tl.load(noise + i).to(tl.uint32), WORD).to(tl.int32))


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_rounding_of_any_bits(dtype):
    """Every exponent, both signs, ties, Inf, NaN, subnormals."""
    n, dropped = 8192, 16 if dtype == BF16 else 13
    bits = torch.randint(-(2**31), 2**31, (n,))
    bits[::3] = bits[::3] >> dropped << dropped | 1 << dropped - 1  # ties
    corners = [
        0x7F800000,
        0x7FC00001,
        0,
        0x477FEFFF,
        0x477FF000,
        0x47800000,
        0x33000000,
        0x33000001,
        0x38800000,
        0x387FFFFF,
    ]
    bits[: len(corners)] = torch.tensor(corners)
    noise = torch.randint(0, 2**16, (n,))
    bits, noise = bits.to(DEVICE, torch.int32), noise.to(DEVICE, torch.int32)
    near, random = torch.zeros_like(bits), torch.zeros_like(bits)
    _round_kernel[(1,)](bits, noise, near, random, WORD=tl.bfloat16 if dtype == BF16 else tl.float16, N=n)
    x, near, random = bits.view(F32), near.to(torch.int16).view(dtype), random.to(torch.int16).view(dtype)
    assert torch.equal(near.isnan(), x.isnan())
    assert same_bits([near[~x.isnan()]], [x.to(dtype)[~x.isnan()]])
    assert torch.equal(random.isnan(), x.isnan())
    finite = x.abs() < torch.finfo(dtype).max
    least = torch.tensor(2.0**-24 if dtype == F16 else 2.0**-133, device=DEVICE)
    unit = torch.maximum(x.abs() * 2.0 ** (dropped - 23), least)
    assert ((random.float() - x).abs() <= unit)[finite].all()
    exact = finite & (x.to(dtype).float() == x)
    assert same_bits([random[exact]], [x[exact].to(dtype)])


@triton.jit
def _philox_kernel(out, seed, index, step, stream, N: tl.constexpr):
    i = tl.arange(0, N)
    words = philox(
        tl.load(seed), tl.load(index) + i.to(tl.int64), tl.load(step).to(tl.uint32), tl.load(stream).to(tl.uint32)
    )
    for k in tl.static_range(4):
        tl.store(out + k * N + i, words[k].to(tl.int64))


@pytest.mark.parametrize(
    ("seed", "index", "step", "stream", "first"),
    [
        (0, 0, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (0x299F31D0A4093822, 0x85A308D3243F6A88, 0x13198A2E, 0x03707344, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ],
    ids=["zeros", "pi"],
)
def test_philox_known_answers(seed, index, step, stream, first):
    """Vectors of the authors' Random123; then its neighbours from plain integers."""
    signed = [struct.unpack("q", struct.pack("Q", x))[0] for x in (seed, index, step, stream)]
    out = torch.zeros(4, 16, dtype=torch.int64, device=DEVICE)
    _philox_kernel[(1,)](out, *(torch.tensor([x], device=DEVICE) for x in signed), N=16)
    assert [f"{x & 0xFFFFFFFF:08x}" for x in out[:, 0].tolist()] == first.split()
    expected = [plain_philox(seed, index + i, step, stream) for i in range(16)]
    assert (out & 0xFFFFFFFF).T.tolist() == expected


@triton.jit
def _noise_kernel(blocks, elements, first, seed, step, stream, N: tl.constexpr):
    i = tl.arange(0, N)
    key, start = tl.load(seed), tl.load(first)
    tl.store(blocks + i, noise_of_blocks(key, start, step.to(tl.uint32), stream.to(tl.uint32), N).to(tl.int64))
    element = start + i.to(tl.int64)
    tl.store(elements + i, noise_of_elements(key, element, step.to(tl.uint32), stream.to(tl.uint32)).to(tl.int64))


def test_noise_of_blocks_is_that_of_their_elements():
    first, seed = (1 << 40) + 16, 12345678901
    blocks, elements = torch.zeros(2, 64, dtype=torch.int64, device=DEVICE)
    numbers = (torch.tensor([x], device=DEVICE) for x in (first, seed))
    _noise_kernel[(1,)](blocks, elements, *numbers, 9, 3, N=64)
    expected = plain_noise(64, seed, first, 9, 3)
    assert torch.equal(blocks.cpu(), expected)
    assert torch.equal(elements.cpu(), expected)
