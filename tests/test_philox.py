"""Philox and rounding: known answers, an independent implementation in Python integers, every back end."""

from __future__ import annotations

import itertools
import math
import struct

import pytest
import torch
from helpers import LOW, Call, bits, each_dtype, each_rule, halves, lay
from hypothesis import given
from hypothesis import strategies as st

import torsion
from torsion.ops import _native
from torsion.ops._rules import TAM
from torsion.reference import philox, rounding_bits, stochastic_round

needs_plan = pytest.mark.skipif(_native.plan is None, reason=_native.missing.get("_plan", ""))
WORD = 2**32


def judge_philox(counter, key):
    """Philox4x32-10 as Salmon et al. (2011) print it: ten rounds of two products and a Weyl sequence of keys."""
    a, b, c, d = counter
    k, l = key  # noqa: E741
    for _ in range(10):
        high_0, low_0 = divmod(a * 0xD2511F53, WORD)
        high_1, low_1 = divmod(c * 0xCD9E8D57, WORD)
        a, b, c, d = high_1 ^ b ^ k, low_1, high_0 ^ d ^ l, low_0
        k, l = (k + 0x9E3779B9) % WORD, (l + 0xBB67AE85) % WORD  # noqa: E741
    return a, b, c, d


def judge_bits(element, seed, step, tensor):
    """16 bits per element: a block of four words serves eight elements, low half first."""
    words = judge_philox((element // 8 % WORD, element // 8 // WORD, step, tensor), (seed % WORD, seed // WORD))
    lane = element % 8
    return words[lane // 2] >> (16 * (lane % 2)) & 0xFFFF


ONES = 2**32 - 1
KNOWN = {  # counter, key -> words; the first three are Random123's own
    "zeros": ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    "ones": ((ONES, ONES, ONES, ONES), (ONES, ONES), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    "pi": (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
    "seed-1234-step-7-tensor-3": ((0, 0, 7, 3), (1234, 0), "11d75256 6c8be0ac 3f9870c0 7fe04ab2"),
}
each_known = pytest.mark.parametrize(("counter", "key", "words"), KNOWN.values(), ids=KNOWN)


@each_known
def test_known_answers_of_the_judge(counter, key, words):
    assert " ".join(f"{w:08x}" for w in judge_philox(counter, key)) == words


@each_known
def test_known_answers_of_the_reference(counter, key, words):
    index = torch.tensor(counter[0] + (counter[1] << 32) - (2**64 if counter[1] >> 31 else 0))
    found = philox(key[0] + (key[1] << 32), index, counter[2], counter[3])
    assert " ".join(f"{int(w):08x}" for w in found) == words


@needs_plan
@each_known
def test_known_answers_of_the_compiled_code(counter, key, words):
    found = _native.plan.philox(key[0] + (key[1] << 32), counter[0] + (counter[1] << 32), counter[2], counter[3])
    assert " ".join(f"{w:08x}" for w in found) == words


@needs_plan
@given(
    seed=st.integers(0, 2**53 - 1),
    index=st.integers(0, 2**62),
    step=st.integers(0, 2**32 - 1),
    tensor=st.integers(0, 2**31 - 1),
)
def test_compiled_code_reference_and_judge_are_equal(seed, index, step, tensor):
    expected = judge_philox((index % WORD, index // WORD, step, tensor), (seed % WORD, seed // WORD))
    assert _native.plan.philox(seed, index, step, tensor) == expected
    assert tuple(int(w) for w in philox(seed, torch.tensor(index), step, tensor)) == expected


@pytest.mark.parametrize("key", [0, 3, 8, 2**35 - 5])
def test_bits_of_an_element_are_those_of_the_judge(key):
    """Also where an element's number does not start a block, and beyond 32 bits."""
    found = rounding_bits(40, 2**40 + 17, key, 7, 3, torch.device("cpu")).tolist()
    assert found == [judge_bits(key + i, 2**40 + 17, 7, 3) for i in range(40)]


# Rounding, to nearest and at random


def judge_round(x, dtype, noise):
    """One float32 to the neighbour that the noise picks, in exact integers: up where noise exceeds what is missing."""
    sign, x = math.copysign(1, x), abs(x)
    if dtype == torch.bfloat16:
        kept = (struct.unpack("<I", struct.pack("<f", x))[0] + noise) >> 16 << 16
        return sign * struct.unpack("<f", struct.pack("<I", kept))[0]
    noise &= 0x1FFF
    # Multiples of the last place of float16, and noise in 2^-13 of it.
    exponent = max(math.frexp(x)[1] - 11, -24)
    parts = math.ldexp(x, 13 - exponent)
    rounded = math.ldexp(math.floor((math.floor(parts) + noise) / 8192), exponent)
    return sign * (rounded if rounded < 65536 else math.inf)


def samples(dtype):
    """float32 numbers of every kind that rounding meets: exact, halfway, subnormal, next to overflow, any size."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(400, generator=generator) * 2.0 ** torch.randint(-30, 15, (400,), generator=generator)
    exact = torch.randn(50, generator=generator).to(dtype).float()
    halfway = (exact + torch.nextafter(exact.to(dtype), torch.full((50,), torch.inf, dtype=dtype)).float()) / 2
    subnormal = torch.rand(200, generator=generator) * 2.0**-14
    tiny = torch.rand(100, generator=generator) * 2.0**-23
    largest = torch.finfo(dtype).max
    edge = torch.tensor([0.0, 2.0**-14, 2.0**-24, 2.0**-14 - 2.0**-26, largest, largest * (1 - 2.0**-12), 65519.0])
    return torch.cat([normal, exact, halfway, subnormal, -subnormal, tiny, edge, -edge]).float()


def through_the_op(values, dtype, target, seed=11, step=4, tensor=2, stochastic=True):
    """float32 numbers as an op stores them: theta = 0 - (-1) m, where m stays as it is.

    ``step`` - 1 steps taken before and the tensor's slot are part of the counter.
    """
    momentum = values.to(target.device).clone()
    param = torch.zeros_like(momentum, dtype=dtype)  # laid out as the values are
    numbers = {"momentum": 1.0, "lr": -1.0, "stochastic": float(stochastic), "seed": seed}
    call = Call(TAM, [param], states=[[momentum]], numbers=numbers)
    call.slots, call.steps = [tensor], torch.full((tensor + 1,), float(step - 1), device=target.device)
    call.run(target.backend)
    assert torch.equal(momentum.cpu(), values), "the momentum was to stay"
    return param.cpu()


@each_dtype(*LOW)
def test_rounding_to_nearest_is_torchs(dtype, target):
    """Ties to even, subnormals, overflow to infinity: the numbers above and 20000 float32 of random bits."""
    random = torch.randint(-(2**31), 2**31, (20000,)).to(torch.int32).view(torch.float32)
    values = torch.cat([samples(dtype), random[random.isfinite()]])
    found = through_the_op(values, dtype, target, stochastic=False)
    assert torch.equal(found, values.to(dtype))


@each_dtype(*LOW)
def test_every_number_of_a_storage_type_is_read_and_written_exactly(dtype, target):
    """All finite patterns as gradient, m = g at a seeding step, and as parameter at a rate of 0."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    kept = patterns.isfinite()
    if target.interpreted and dtype == torch.bfloat16:
        # Triton's interpreter casts bfloat16 subnormals to other numbers (1e-38 to 8.3e-39); code for a GPU is exact.
        kept &= (patterns == 0) | (patterns.abs() >= torch.finfo(dtype).tiny)
    grad = patterns[kept].to(target.device)
    call = Call(TAM, [grad.flip(0)], [grad], numbers={"clone": 1.0, "lr": 0.0})
    before = bits(call.params[0])
    call.run(target.backend)
    assert torch.equal(call.states[0][0], grad.float())
    # Only the sign of zero may go: -0 - 0 * m.
    same = bits(call.params[0]).view(torch.int16) == before.view(torch.int16)
    assert (same | (call.params[0].cpu() == 0)).all()


@each_dtype(*LOW)
def test_every_back_end_rounds_as_the_judge(dtype, target):
    """Bit for bit, from the counter to the last place."""
    values = samples(dtype)
    found = through_the_op(values, dtype, target)
    expected = torch.tensor(
        [judge_round(x, dtype, judge_bits(i, 11, 4, 2)) for i, x in enumerate(values.tolist())], dtype=torch.float64
    )
    different = found.double() != expected
    assert not different.any(), f"{values[different]} -> {found[different]}, expected {expected[different]}"


@each_dtype(*LOW)
def test_rounding_goes_to_a_neighbour(dtype, fast_target):
    values = samples(dtype)
    found = through_the_op(values, dtype, fast_target)
    nearest = values.to(dtype)
    below = torch.nextafter(nearest, torch.full_like(nearest, -torch.inf))
    above = torch.nextafter(nearest, torch.full_like(nearest, torch.inf))
    assert ((found == nearest) | (found == below) | (found == above)).all()
    outside = (found.double() - values.double()).abs() >= (above.double() - below.double())
    assert not (outside & found.isfinite() & above.isfinite() & below.isfinite()).any()


@each_dtype(*LOW)
def test_exact_values_stay(dtype, target):
    """What the storage type can hold is never moved, whatever the noise: subnormals and the largest included."""
    patterns = torch.arange(-(2**15), 2**15, 7, dtype=torch.int32).to(torch.int16).view(dtype)
    # Larger ones, squared and summed, are still finite in float64; bfloat16 subnormals are float32 subnormals.
    values = patterns[patterns.isfinite()].float()
    found = through_the_op(values, dtype, target)
    assert torch.equal(found.float(), values)


@pytest.mark.parametrize("fraction", [1 / 64, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [
        (torch.bfloat16, 1.0, 1.0 + 2.0**-7),
        (torch.bfloat16, -3.0, -3.0 - 2.0**-6),
        (torch.float16, 1.0, 1.0 + 2.0**-10),
        (torch.float16, 5 * 2.0**-24, 6 * 2.0**-24),
        (torch.float16, 0.0, 2.0**-24),
    ],
    ids=["bfloat16", "bfloat16-negative", "float16", "float16-subnormal", "float16-below-the-smallest"],
)
def test_rounding_is_unbiased(dtype, low, high, fraction, fast_target):
    """Of n equal numbers a share equal to their distance goes up; 5 sigma of a binomial, and the seed is fixed."""
    n = 2**17
    x = low + fraction * (high - low)
    found = through_the_op(torch.full((n,), x), dtype, fast_target).double()
    assert set(found.unique().tolist()) <= {low, high}
    share = float((found == high).double().mean())
    assert abs(share - fraction) < 5 * math.sqrt(fraction * (1 - fraction) / n)


@each_dtype(*LOW)
def test_updates_below_the_last_place_add_up(dtype, fast_target):
    """300 steps of a fiftieth of the last place move a parameter by six of them on average; to nearest, by none."""
    last = 2.0 ** (-7 if dtype == torch.bfloat16 else -10)
    drift = {}
    for stochastic in (False, True):
        p = fast_target.parameter(torch.full((256,), 1.25), dtype)
        optimizer = fast_target.optimizer(
            torsion.TAM, [p], lr=last / 50, momentum=0.0, decay=1.0, eps_damping=0.0, stochastic_rounding=stochastic
        )
        p.grad = torch.full_like(p, -2.0)  # damped by 1/2
        for _ in range(300):
            optimizer.step()
        drift[stochastic] = float(p.detach().double().mean() - 1.25) / last
    assert drift[False] == 0
    # One parameter walks with variance 300 / 50; the mean of 256 of them has a sigma of 0.153.
    assert drift[True] == pytest.approx(6, abs=5 * 0.153)


def test_infinity_and_nan_stay():
    """The optimizer skips before it meets any; an overflow of the update itself still must not become a number."""
    # NaN of every kind: a carry out of the payload would make infinity of one, or zero.
    patterns = [0x7F800000, -0x800000, 0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF]
    special = torch.tensor(patterns, dtype=torch.int32).view(torch.float32)
    for dtype in LOW:
        for noise in (0, 0x1FFF, 0xFFFF):
            found = stochastic_round(special, dtype, torch.full((len(patterns),), noise)).double()
            assert found[:2].tolist() == [math.inf, -math.inf]
            assert found[2:].isnan().all()


@each_dtype(*LOW)
def test_overflow_of_the_update_is_infinite(dtype, fast_target):
    values = torch.tensor([3e38, -3e38, 1.0])
    param = torch.zeros(3, dtype=dtype, device=fast_target.device)
    numbers = {"momentum": 1.0, "lr": -2.0, "stochastic": 1.0}
    Call(TAM, [param], states=[[values.to(fast_target.device)]], numbers=numbers).run(fast_target.backend)
    assert param.tolist() == [math.inf, -math.inf, 2.0]


# Which numbers an element draws


@each_dtype(*LOW)
@each_rule
def test_noise_is_equal_across_back_ends(rule, dtype, target):
    """A whole step with random gradients, against the reference: the same bits wherever it runs."""
    runs = []
    for backend in (target.backend, "reference"):
        torch.manual_seed(2)
        params = [torch.randn(n, device=target.device).to(dtype) for n in (37, 1, 1030)]
        grads = [torch.randn_like(p) for p in params]
        call = Call(rule, params, grads, numbers={"stochastic": 1.0, "seed": 2.0**52 + 5, "lr": 0.01})
        call.slots, call.steps = [4, 0, 2], torch.arange(5.0, device=target.device)
        call.run(backend)
        runs.append([bits(p) for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_noise_depends_on_seed_step_tensor_and_element(fast_target):
    values = torch.full((4096,), 1 + 2.0**-8)
    plain = through_the_op(values, torch.bfloat16, fast_target)
    assert torch.equal(plain, through_the_op(values, torch.bfloat16, fast_target))
    for change in ({"seed": 12}, {"seed": 11 + 2**32}, {"step": 5}, {"tensor": 3}):
        other = through_the_op(values, torch.bfloat16, fast_target, **change)
        # Independent coins agree on half of the elements.
        agree = int((plain == other).sum())
        assert abs(agree - 2048) < 5 * 32, change
    assert 0.4 < float((plain[1:] == plain[:-1]).float().mean()) < 0.6


@pytest.mark.parametrize("layout", ["channels_last", "transposed"])
def test_noise_goes_by_place_in_memory_not_by_index(layout, target):
    """What lies first draws first, so that the kernels can walk a tensor as it lies."""
    values = lay(torch.randn(2, 3, 4, 5), layout)
    found = through_the_op(values, torch.bfloat16, target)
    assert found.stride() == values.stride()
    before, after = (t.as_strided((120,), (1,)).double().tolist() for t in (values, found))
    assert after == [judge_round(x, torch.bfloat16, judge_bits(i, 11, 4, 2)) for i, x in enumerate(before)]


@pytest.mark.parametrize("cut", [8, 13], ids=["whole-block", "inside-a-block"])
@each_dtype(*LOW)
def test_noise_of_a_shard_is_that_of_its_elements_in_the_whole(dtype, cut, target):
    """``keys`` say where in the unsharded tensor a part begins; any number of ranks draws the same."""
    values = torch.randn(40, device=target.device)
    results = []
    for bounds in ([0, 40], [0, cut, 40]):
        parts = list(itertools.pairwise(bounds))
        params = [torch.zeros(b - a, dtype=dtype, device=target.device) for a, b in parts]
        numbers = {"momentum": 1.0, "lr": -1.0, "stochastic": 1.0, "seed": 11.0}
        for p, (a, b) in zip(params, parts, strict=True):  # one call each: a slot takes part once in a step
            call = Call(TAM, [p], states=[[values[a:b].clone()]], numbers=numbers)
            halves(call, target, keys=[a])[1]()
        results.append(bits(torch.cat(params)))
    assert torch.equal(*results)


def test_noise_goes_by_place_in_memory_not_by_chunk(fast_target):
    """Elements of a long tensor draw the numbers of their place, across the chunks of the kernels."""
    n = 2 * 16384 + 100
    values = torch.full((n,), 1 + 2.0**-8)
    found = through_the_op(values, torch.bfloat16, fast_target)
    for i in (0, 1, 7, 8, 1023, 1024, 16383, 16384, 16385, 32768, n - 1):
        assert float(found[i]) == judge_round(1 + 2.0**-8, torch.bfloat16, judge_bits(i, 11, 4, 2)), i
    assert not torch.equal(found[:16384], found[16384:32768])
