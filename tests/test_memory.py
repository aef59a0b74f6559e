"""Which memory a step touches: guard regions, nothing at all, odd addresses, and addresses beyond 2^31 elements."""

from __future__ import annotations

import pytest
import torch
from helpers import CHUNK, LOW, Call, bits, each_class, each_dtype, each_rule, ids, randoms, snapshot, take_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import COSINE, STATE, STORED, close

import torsion
from torsion.ops import _native

GUARD = 0xA5
PAD = 256  # bytes on either side: more than the widest store
needs_plan = pytest.mark.skipif(_native.plan is None, reason=_native.missing.get("_plan", ""))


class Guarded:
    """A tensor between two regions that nobody may write to."""

    def __init__(self, values: torch.Tensor, offset: int = 0) -> None:
        """Lay ``values`` out flat, ``offset`` elements past a multiple of 64 bytes."""
        width, size = values.element_size(), values.numel() * values.element_size()
        self.buffer = torch.full((2 * PAD + size + 64,), GUARD, dtype=torch.uint8, device=values.device)
        begin = PAD + (-(self.buffer.data_ptr() + PAD)) % 64 + offset * width
        self.begin, self.end = begin, begin + size
        self.tensor = self.buffer[begin : begin + size].view(values.dtype)
        self.tensor.copy_(values.reshape(-1))
        self.inside = self.buffer[begin : begin + size].clone()

    def check_guards(self) -> None:
        assert (self.buffer[: self.begin] == GUARD).all(), "written before the tensor"
        assert (self.buffer[self.end :] == GUARD).all(), "written past the tensor"

    def check_unchanged(self) -> None:
        self.check_guards()
        assert torch.equal(self.buffer[self.begin : self.end], self.inside), "an input was written to"


def _guarded_step(rule, target, dtype, lengths, offset, numbers=None):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    place = lambda dtype: [Guarded(torch.rand(n, device=target.device).to(dtype) + 1, offset) for n in lengths]  # noqa: E731
    params, grads, states = place(dtype), place(dtype), [place(wide) for _ in rule.states]
    plain = lambda guarded: [g.tensor for g in guarded]  # noqa: E731
    call = Call(rule, plain(params), plain(grads), [plain(s) for s in states], numbers or {})
    expected = Call(rule, *([t.clone() for t in plain(x)] for x in (params, grads)),
                    [[t.clone() for t in plain(s)] for s in states], numbers or {})  # fmt: skip
    call.run(target.backend)
    expected.run("reference")
    for g in grads:
        g.check_unchanged()
    for guarded, states_row, result in [
        *((g, False, e) for g, e in zip(params, expected.params, strict=True)),
        *((g, True, e) for row, es in zip(states, expected.states, strict=True) for g, e in zip(row, es, strict=True)),
    ]:
        guarded.check_guards()
        close(guarded.tensor, result, STATE[dtype] if states_row else STORED[dtype], f"length {len(result)}")
        assert not result.numel() or not torch.equal(guarded.buffer[guarded.begin : guarded.end], guarded.inside)


LENGTHS = [*range(1, 18), 31, 33, 63, 127, 500, 1023, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 9]


@pytest.mark.parametrize("stochastic", [False, True], ids=["nearest", "stochastic"])
@pytest.mark.parametrize("offset", [0, 1, 3, 4], ids=lambda n: f"offset-{n}")
@each_dtype()
@each_rule
def test_guard_regions(rule, dtype, offset, stochastic, compiled_target):
    """Every length around a vector, a block of noise and a chunk, aligned and not, each between guards."""
    numbers = {"weight_decay": 0.1, "stochastic": float(stochastic), "seed": 5.0}  # no flag for wide parameters
    _guarded_step(rule, compiled_target, dtype, LENGTHS, offset, numbers)


@pytest.mark.parametrize("offset", [0, 1], ids=lambda n: f"offset-{n}")
@each_dtype(torch.float32, torch.bfloat16)
@each_rule
def test_guard_regions_in_triton(rule, dtype, offset, triton_target):
    _guarded_step(rule, triton_target, dtype, [1, 7, 16, 500, 4097], offset)


@settings(max_examples=40)
@given(lengths=st.lists(st.integers(0, 300), min_size=1, max_size=6), offset=st.integers(0, 9))
def test_guard_regions_anywhere(compiled_target, lengths, offset):
    _guarded_step(torsion.ops._rules.TAM, compiled_target, torch.bfloat16, lengths, offset)


@each_class
def test_guards_around_the_optimizers_own_state(cls, fast_target):
    """State buffers replaced by guarded ones after the first step; so is the gradient at each step."""
    shapes = [(33,), (CHUNK + 5,)]
    params = [Guarded(t.to(fast_target.device, torch.float32), 1) for t in randoms(shapes)]
    optimizer = fast_target.optimizer(cls, [torch.nn.Parameter(g.tensor) for g in params], lr=0.01)
    take_steps(optimizer, [randoms(shapes)])
    leaves, guards = optimizer.param_groups[0]["params"], list(params)
    for p in leaves:
        for key, value in optimizer.state[p].items():
            if value.dim():
                guards.append(Guarded(value, 3))
                optimizer.state[p][key] = guards[-1].tensor
    for _ in range(2):
        grads = [Guarded(t.to(fast_target.device, torch.float32), 2) for t in randoms(shapes)]
        for p, g in zip(leaves, grads, strict=True):
            p.grad = g.tensor
        optimizer.step()
        for g in guards:
            g.check_guards()
        for g in grads:
            g.check_unchanged()
    buffers = {t.data_ptr() for p in leaves for t in optimizer.state[p].values() if t.dim()}
    assert buffers <= {g.tensor.data_ptr() for g in guards}, "the guarded buffers are no longer the optimizer's"


def test_fresh_memory_is_poisoned(fast_target):
    """The fixture of conftest.py: what is read before it is written shows."""
    assert torch.empty(9, device=fast_target.device).isnan().all()
    assert torch.empty_like(torch.ones(3, dtype=torch.bfloat16, device=fast_target.device)).isnan().all()
    assert (torch.empty(3, dtype=torch.int64, device=fast_target.device) == torch.iinfo(torch.int64).max).all()


# Nothing at all


@each_class
def test_zero_element_tensors_alone(cls, target):
    """Steps are counted, nothing is skipped, the cosine of nothing is 0."""
    params = [target.parameter(torch.zeros(shape)) for shape in [(0,), (3, 0, 2)]]
    optimizer = target.optimizer(cls, params, scope="tensor")
    take_steps(optimizer, [[torch.zeros(0), torch.zeros(3, 0, 2)]] * 2)
    assert [optimizer.state[p]["step"].item() for p in params] == [2, 2]
    assert [c.item() for c in optimizer.cosine().values()] == [0, 0]
    assert optimizer.grad_norm().item() == 0
    assert optimizer.skipped_steps().item() == 0


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_zero_element_tensors_among_others(scope, target):
    """They leave the others as they would be without them."""
    start, gradients = randoms([(5,), (0,), (3,)]), [randoms([(5,), (0,), (3,)]) for _ in range(2)]
    results = []
    for kept in ([0, 1, 2], [0, 2]):
        params = [target.parameter(start[i]) for i in kept]
        optimizer = target.optimizer(torsion.TAM, params, lr=0.1, scope=scope)
        take_steps(optimizer, [[grads[i] for i in kept] for grads in gradients])
        results.append([p for p in params if p.numel()])
    for a, b in zip(*results, strict=True):
        close(a, b, STATE[torch.float64])


@each_rule
def test_empty_list(rule, target):
    """An op over no tensors: a step of nothing, and not an error."""
    call = Call(rule, [])
    call.shared = torch.tensor([[0.3, 0.2, 0.65]], device=target.device)
    call.steps = torch.zeros(0, device=target.device)
    call.status = torch.zeros(4, dtype=torch.int64, device=target.device)
    call.run(target.backend)
    assert call.shared.tolist() == torch.tensor([[0.3, 0.2, 0.65]]).tolist()
    assert call.status.tolist()[:3] == [0, 0, 0]


# Odd addresses


@each_dtype()
@each_class
def test_misaligned_views_give_the_same_bits_as_aligned_tensors(cls, dtype, fast_target):
    """Alignment chooses vector or scalar accesses, never a result."""
    lengths = [(1025,), (CHUNK + 21,)]
    start, gradients = randoms(lengths), [randoms(lengths) for _ in range(2)]
    runs = []
    for layout in ("contiguous", "misaligned"):
        torch.manual_seed(5)
        params = [fast_target.parameter(t, dtype, layout) for t in start]
        assert (params[0].data_ptr() % 16 == 0) == (layout == "contiguous")
        optimizer = fast_target.optimizer(cls, params, lr=0.01, stochastic_rounding=dtype in LOW)
        take_steps(optimizer, gradients)
        runs.append([bits(t) for t in snapshot(optimizer)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_gradients_that_move_to_odd_addresses(dtype, fast_target):
    """A launch table is kept between steps; a gradient that comes back elsewhere is followed, alignment included."""
    start = randoms([(1025,)])[0]
    kept, moved = (fast_target.parameter(start, dtype) for _ in range(2))
    a, b = (fast_target.optimizer(torsion.TAM, [p], lr=0.1) for p in (kept, moved))
    kept.grad = torch.zeros_like(kept)
    for offset in (0, 1, 0, 3, 8):
        g = torch.randn(1025, device=fast_target.device).to(dtype)
        kept.grad.copy_(g)
        moved.grad = Guarded(g, offset).tensor
        a.step()
        b.step()
        assert torch.equal(bits(kept), bits(moved))


# Beyond 2^31 elements


def _table(numel, streams=3, scopes=None):
    """A launch table over tensors that do not exist: planning looks at sizes and addresses, not at memory."""
    table = _native.plan.Table()
    n = len(numel)
    starts = [[(i + 1 + 10 * k) << 44 for i in range(n)] for k in range(streams)]
    table.build(
        pointers=starts, numel=numel, kinds=[0] * n, scopes=scopes or [0] * n, groups=[0] * n, slots=list(range(n)),
        weights=[], keys=[], n_scopes=max(scopes or [0]) + 1, n_groups=1,
    )  # fmt: skip
    return table


@needs_plan
@pytest.mark.parametrize(
    "numel", [2**31 - 1, 2**31, 2**31 + 5, 2**32 + 1, 3 * 2**33 + 7], ids=lambda n: f"{n / 2**31:g}x2^31"
)
def test_launch_arithmetic_beyond_2_to_the_31_elements(numel):
    """The pieces of a tensor cover it from 0 to its end without gap or overlap, in 64 bits."""
    chunk = _native.plan.CHUNK
    table = _table([numel, 3])
    count = -(-numel // chunk)
    assert table.pieces == count + 1
    for i in (0, 1, 2**31 // chunk - 1, 2**31 // chunk, count - 2, count - 1):
        if i < count:
            assert table.piece(i) == (0, i * chunk, min(numel, (i + 1) * chunk))
    assert table.piece(count) == (1, 0, 3)


@needs_plan
def test_many_tensors_beyond_2_to_the_31_elements_in_sum():
    """Each is small, together they are not; every piece belongs to its own tensor."""
    n, chunk = 5, _native.plan.CHUNK
    numel = 2**30 + 1
    per = numel // chunk + 1
    table = _table([numel] * n, scopes=[1, 0, 1, 0, 0])
    assert table.pieces == n * per
    order = [1, 3, 4, 0, 2]  # those of a scope side by side
    for place, slot in enumerate(order):
        assert table.piece(place * per) == (slot, 0, chunk)
        assert table.piece((place + 1) * per - 1) == (slot, numel - 1, numel)


@needs_plan
def test_tensors_of_a_scope_keep_their_order():
    """Sums are taken in the order of the table, so sorting by scope must not shuffle the rest."""
    n = 100
    table = _table([3] * n, scopes=[i % 3 for i in range(n)])
    slots = [table.piece(i)[0] for i in range(n)]
    assert slots == sorted(range(n), key=lambda i: (i % 3, i))


@needs_plan
def test_memory_of_a_table_is_64_bytes_per_chunk():
    """What a step needs beyond parameters, gradients and state, for a tensor of 2^35 elements."""
    table = _table([2**35])
    for rule in ("tam", "adatam"):
        assert table.workspace_bytes(rule) < 64 * table.pieces + 2**20


@needs_plan
@pytest.mark.parametrize("numel", [[2**45], [2**44, 2**44], [2**62]], ids=["one", "two", "enormous"])
def test_more_chunks_than_32_bits_hold_are_refused(numel):
    with pytest.raises(OverflowError, match="more than 2\\^31 chunks"):
        _table(numel)


@needs_plan
def test_sizes_below_zero_are_refused():
    with pytest.raises(ValueError, match="row 0 is out of range"):
        _table([-1])


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.backend(name)) for name in ("cuda", "triton")]
)
def test_more_than_2_to_the_31_elements_on_the_gpu(backend):
    """bfloat16: 4.3 GB of parameters, as much of gradients, 8.6 GB of state; both ends and the middle must move."""
    if torch.cuda.mem_get_info()[0] < 24e9:
        pytest.skip("less than 24 GB of GPU memory free")
    n = 2**31 + 100
    p = torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16, device="cuda"))
    p.grad = torch.ones_like(p)
    optimizer = torsion.TAM([p], lr=1.0, backend=backend)
    optimizer.step()
    optimizer.step()
    close(optimizer.cosine()["global"], 1.0, COSINE[torch.float32])
    # m = 1/2, then 0.9/2 + 0.55; theta moves by the sum of both.
    for part in (p[:100], p[2**31 - 100 : 2**31 + 100], p[-100:]):
        close(part, torch.full(part.shape, -1.5), STORED[torch.bfloat16])
