"""Normals by Philox: known answers, an evaluation in float64, every instruction set and number of threads, moments."""

from __future__ import annotations

import math

import pytest
import torch
from demp import CASES, GUARD, each_backend, guarded, in_child, untouched
from helpers import each_dtype, same_bits
from tolerances import NORMALS, Row, close

import torsion
from torsion.ops import _native
from torsion.reference import philox

needs_c = pytest.mark.skipif(_native.C is None, reason=_native.missing.get("_C", ""))
KEY = dict(seed=1234, step=7, tensor_id=3)


def judge(n: int, seed: int, step: int, tensor_id: int, bits: int) -> torch.Tensor:
    """The first n normals in float64, pair by pair with Python's own functions; ``bits`` of a word make a uniform."""
    found: list[float] = []
    for q in range((n + 3) // 4):
        words = [int(w) for w in philox(seed, torch.tensor(q), step, tensor_id)]
        for a, b in (words[:2], words[2:]):
            u1, u2 = (((w >> (32 - bits)) + 0.5) * 2.0**-bits for w in (a, b))
            r = math.sqrt(-2 * math.log(u1))
            found += [r * math.cos(2 * math.pi * u2), r * math.sin(2 * math.pi * u2)]
    return torch.tensor(found[:n], dtype=torch.float64)


@each_backend
@pytest.mark.parametrize("name", ["N1", "N2"])
def test_golden(name, backend):
    case = CASES[name]
    q = case["inputs"]["q"]
    found = torsion.ops.philox_normal((4 * q + 4,), **KEY, dtype=torch.float64, backend=backend)[4 * q :]
    close(found, torch.tensor(case["expected"]["normals"], dtype=torch.float64), Row(1e-13, why="the golden figure"))


@each_backend
@each_dtype()
def test_against_float64(dtype, backend):
    found = torsion.ops.philox_normal((1001,), 2**64 - 5, 2**32 - 1, 2**32 - 2, dtype=dtype, backend=backend)
    expected = judge(1001, 2**64 - 5, 2**32 - 1, 2**32 - 2, 32 if dtype == torch.float64 else 23)
    assert found.dtype == dtype
    close(found, expected, NORMALS[dtype])


@needs_c
@each_dtype(torch.float32, torch.float64)
def test_a_million_against_the_reference(dtype):
    found = torsion.ops.philox_normal((1000, 1000), **KEY, dtype=dtype, backend="cpu")
    close(found, torsion.reference.philox_normal((1000, 1000), **KEY, dtype=dtype), NORMALS[dtype])


@each_backend
@each_dtype(torch.bfloat16, torch.float16)
def test_low_precision_is_float32_cast_once(dtype, backend):
    whole = torsion.ops.philox_normal((4099,), **KEY, backend=backend)
    assert same_bits(torsion.ops.philox_normal((4099,), **KEY, dtype=dtype, backend=backend), whole.to(dtype))


@each_backend
@each_dtype()
def test_an_element_does_not_depend_on_the_shape(dtype, backend):
    whole = torsion.ops.philox_normal((5000,), **KEY, dtype=dtype, backend=backend)
    for shape in ((), (1,), (3,), (255,), (257,), (33, 31), (7, 5, 9, 2), (0,), (3, 0)):
        part = torsion.ops.philox_normal(shape, **KEY, dtype=dtype, backend=backend)
        assert part.shape == shape
        assert part.is_contiguous()
        assert same_bits(part.flatten(), whole[: part.numel()])


def test_seed_step_and_tensor_each_change_the_numbers():
    draws = [torsion.ops.philox_normal((100,), *key) for key in ((1, 2, 3), (2, 2, 3), (1, 3, 3), (1, 2, 4))]
    draws.append(torsion.ops.philox_normal((100,), 1 + 2**40, 2, 3))
    for i, a in enumerate(draws):
        for b in draws[i + 1 :]:
            assert (a == b).sum() < 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_moments(dtype):
    """The figures of the specification for 200,000 draws; their own errors are 0.002, 0.003 and 0.011."""
    x = torsion.ops.philox_normal((200_000,), **KEY, dtype=dtype).double()
    assert abs(float(x.mean()) - 0.0021) < 1e-4
    assert abs(float(x.var()) - 0.9980) < 1e-4
    assert abs(float((x - x.mean()).pow(4).mean() / x.var() ** 2) - 3.0015) < 1e-3
    lagged = [float((x[k:] * x[:-k]).mean()) for k in (1, 2, 3, 4)]
    assert max(map(abs, lagged)) < 0.01


def test_the_tails_are_finite():
    """23 bits: the largest is sqrt(-2 ln 2^-24) = 5.77, and none is infinite however many are drawn."""
    x = torsion.ops.philox_normal((2_000_000,), **KEY)
    assert 4.5 < float(x.abs().max()) < 5.78


@needs_c
@each_dtype()
def test_writes_no_more_than_the_tensor(dtype):
    for n in (1, 2, 3, 5, 31, 32, 33, 255, 256, 257, 1023):
        inner, whole = guarded(torch.zeros(n, dtype=dtype))
        torch.ops.torsion.philox_normal_(inner, 1, 2, 3)
        assert untouched(whole)
        assert same_bits(whole[GUARD:-GUARD], torsion.ops.philox_normal((n,), 1, 2, 3, dtype=dtype))


BITS = (
    "import torch, torsion, demp\n"
    "torch.set_num_threads({threads})\n"
    "print(demp.digest(*(torsion.ops.philox_normal((300, 701), 2**63 + 9, 5, 2, dtype=d) for d in "
    "(torch.float32, torch.float64, torch.bfloat16, torch.float16))))"
)


@needs_c
@pytest.mark.parametrize("level", ["0", "1", "2"], ids=["baseline", "x86-64-v3", "x86-64-v4"])
def test_instruction_sets_and_threads_are_equal(level):
    here = {}
    exec(BITS.format(threads=1).replace("print(", "here['it'] = ("), {"here": here})
    assert in_child(BITS.format(threads=3), TORSION_ISA=level) == here["it"]


def test_torchs_generator_is_not_touched():
    before = torch.get_rng_state()
    torsion.ops.philox_normal((100,), **KEY)
    assert torch.equal(torch.get_rng_state(), before)


# The op


def test_opcheck():
    for dtype in (torch.float32, torch.bfloat16):
        arguments = (torch.zeros(3, 5, dtype=dtype), 1, 2, 3)
        assert set(torch.library.opcheck(torch.ops.torsion.philox_normal_.default, arguments).values()) == {"SUCCESS"}


def test_the_op_is_the_function():
    found = torch.ops.torsion.philox_normal([3, 5], -1, 2, 3, dtype=torch.float64)
    assert same_bits(found, torsion.ops.philox_normal((3, 5), 2**64 - 1, 2, 3, dtype=torch.float64))
    assert torch.ops.torsion.philox_normal([2], 1, 2, 3).dtype == torch.float32


def test_fake_tensors_and_compile():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        assert torch.ops.torsion.philox_normal([3, 5], 1, 2, 3).shape == (3, 5)
    compiled = torch.compile(lambda x: x + torch.ops.torsion.philox_normal(x.shape, 1, 2, 3), backend="aot_eager")
    x = torch.ones(4, 5)
    assert same_bits(compiled(x), x + torsion.ops.philox_normal((4, 5), 1, 2, 3))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (dict(seed=-1), ValueError, r"seed=-1 lies outside \[0, 2\^64\)"),
        (dict(seed=2**64), ValueError, "seed=18446744073709551616"),
        (dict(step=-1), ValueError, r"step=-1 lies outside \[0, 2\^32\)"),
        (dict(step=2**32), ValueError, "step=4294967296"),
        (dict(tensor_id=2**32), ValueError, "tensor_id=4294967296"),
        (dict(tensor_id=-2), ValueError, "tensor_id=-2"),
        (dict(step=1.5), TypeError, "step must be an int, is float"),
        (dict(dtype=torch.int32), TypeError, "dtype=torch.int32"),
        (dict(shape=(3, -1)), ValueError, "negative size"),
        (dict(backend="abacus"), ValueError, "abacus"),
    ],
)
def test_bad_arguments(change, error, message):
    with pytest.raises(error, match=message):
        torsion.ops.philox_normal(**{"shape": (3,), **KEY, **change})


@needs_c
@pytest.mark.parametrize(("step", "tensor_id"), [(2**32, 0), (-1, 0), (0, 2**32), (0, -1)])
def test_the_op_refuses_by_runtime_error(step, tensor_id):
    with pytest.raises(RuntimeError, match=r"must lie in \[0, 2\^32\)"):
        torch.ops.torsion.philox_normal([3], 1, step, tensor_id)


def test_backends_name_it():
    assert torsion.backends()["philox_normal"]["chosen"] in torsion.backends()["philox_normal"]["available"]
