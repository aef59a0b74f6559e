"""The specification's edge-case table and its list of tests: each row a test or more, in its order and words."""

from __future__ import annotations

import math

import pytest
import tolerances
import torch
from helpers import DTYPES, STATES, Duel, bits, each_class, each_dtype, ids, randoms, same_bits, snapshot, take_steps
from tolerances import close

import torsion

# The interpreter divides the infinite clip norm by an infinite gradient norm where a step is skipped.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


def momentum_of(optimizer, p):
    return next(optimizer.state[p][k] for k in STATES if k in optimizer.state[p])


def stepped(target, gradients, cls=torsion.TAM, dtype=torch.float64, **keywords):
    """One parameter at zero after these steps: the parameter and its optimizer."""
    p = target.parameter(torch.zeros(len(gradients[0])), dtype)
    optimizer = target.optimizer(cls, [p], **{"lr": 0.1, **keywords})
    take_steps(optimizer, [[torch.tensor(g, dtype=torch.float64)] for g in gradients])
    return p, optimizer


# g = 0 or m = 0


@each_class
def test_zero_momentum_gives_cosine_zero(cls, target):
    _, optimizer = stepped(target, [(3.0, 4.0)], cls)
    assert optimizer.cosine()["global"].item() == 0
    assert optimizer.damping()["global"].item() == 0.5


@each_class
def test_zero_gradient_decays_correlation_and_momentum(cls, target):
    """s = 0, so s^ shrinks by decay and m by momentum; theta goes on along m."""
    p, optimizer = stepped(target, [(3.0, 4.0), (3.0, 4.0)], cls, decay=0.8)
    m, correlation = momentum_of(optimizer, p).clone(), optimizer.state[p]["correlation"].item()
    assert correlation == pytest.approx(0.2)
    take_steps(optimizer, [[torch.zeros(2)]])
    assert optimizer.cosine()["global"].item() == 0
    assert optimizer.state[p]["correlation"].item() == pytest.approx(0.8 * correlation, rel=1e-15)
    close(momentum_of(optimizer, p), 0.9 * m, tolerances.GOLDEN[torch.float64])


@each_class
def test_zero_gradient_at_the_first_step_moves_nothing(cls, target):
    p, optimizer = stepped(target, [(0.0, 0.0)], cls)
    assert p.tolist() == [0, 0]
    assert optimizer.grad_norm().item() == 0
    assert optimizer.state[p]["step"].item() == 1


# norms below 1e-8


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float64, 1e-9), (torch.float64, 1e-70), (torch.float32, 1e-30)], ids=str
)
def test_tiny_norms_have_an_exact_cosine(dtype, size, target):
    """torch's cosine_similarity stops at 1e-8 and would call (1e-9 e1, e1) nearly orthogonal."""
    _, optimizer = stepped(target, [(size, 0.0), (3.0, 4.0)], dtype=dtype)
    assert optimizer.cosine()["global"].item() == pytest.approx(0.6, rel=1e-6)
    _, optimizer = stepped(target, [(3.0, 4.0), (0.0, -size)], dtype=dtype)
    assert optimizer.cosine()["global"].item() == pytest.approx(-0.8, rel=1e-6)


# huge values


@each_class
def test_huge_float64_gradient_skips(cls, target):
    """1e200 squared is beyond float64: the step is skipped, not taken with a cosine of 0."""
    _, optimizer = stepped(target, [(3.0, 4.0)], cls)
    before = snapshot(optimizer)
    take_steps(optimizer, [[torch.tensor([1e200, 1e200], dtype=torch.float64)]])
    assert same_bits(snapshot(optimizer), before)
    assert optimizer.skipped_steps().item() == 1
    assert optimizer.grad_norm().item() == math.inf


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_huge_float32_values_are_summed_in_float64(dtype, target):
    """1e30 squared is beyond float32, where sums would overflow, and well inside float64."""
    _, optimizer = stepped(target, [(3e30, 4e30), (3e30, -4e30)], dtype=dtype, lr=1e-30)
    assert optimizer.skipped_steps().item() == 0
    assert optimizer.grad_norm().item() == pytest.approx(5e30, rel=1e-2)
    assert optimizer.cosine()["global"].item() == pytest.approx((9 - 16) / 25, abs=1e-2)


def test_float16_gradients_at_the_end_of_their_range_do_not_overflow_the_sums(fast_target):
    n = 20000
    p = fast_target.parameter(torch.zeros(n), torch.float16)
    optimizer = fast_target.optimizer(torsion.TAM, [p], lr=0.0)
    for _ in range(2):
        p.grad = torch.full_like(p, 65504.0)
        optimizer.step()
    assert optimizer.grad_norm().item() == pytest.approx(65504 * math.sqrt(n), rel=1e-12)
    assert optimizer.cosine()["global"].item() == pytest.approx(1, abs=1e-7)


# rounding


def test_cosine_is_clamped(fast_target):
    """A vector against a multiple of itself: without the clamp rounding gives more than 1 for some of these."""
    over = 0
    params = [fast_target.parameter(torch.zeros(7)) for _ in range(40)]
    optimizer = fast_target.optimizer(torsion.TAM, params, scope="tensor", momentum=0.0)
    gradients = randoms([(7,)] * 40)
    for factor in (1.0, 0.7, -1.3):
        for p, g in zip(params, gradients, strict=True):
            state = optimizer.state.get(p)
            if state:
                m, now = state["momentum_buffer"].cpu().tolist(), (factor * g).tolist()
                dot = sum(a * b for a, b in zip(m, now, strict=True))
                over += abs(dot) > math.sqrt(sum(a * a for a in m)) * math.sqrt(sum(b * b for b in now))
        take_steps(optimizer, [[factor * g for g in gradients]])
        cosines = [c.item() for c in optimizer.cosine().values()]
        assert all(abs(c) <= 1 for c in cosines)
        if factor != 1:
            assert all(abs(c) == pytest.approx(1, abs=1e-15) for c in cosines)
    assert over > 0, "the data no longer shows what the clamp is for"


# one NaN or Inf element


PLACES = {
    "first": (0, 0),
    "end-of-lanes": (0, 31),
    "tail": (0, -1),
    "past-a-chunk": (1, 16384),
    "scalar": (2, 0),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("scope", ["global", "tensor"])
@each_class
def test_one_non_finite_element_skips_the_whole_step(cls, scope, poison, place, fast_target):
    """Every tensor of every dtype and scope keeps its bits; the step after continues as if nothing had been."""
    _poisoned_step(fast_target, cls, scope, poison, *PLACES[place])


@pytest.mark.parametrize("poison", [math.nan, -math.inf], ids=str)
@each_class
def test_one_non_finite_element_skips_on_every_back_end(cls, poison, target):
    _poisoned_step(target, cls, "tensor", poison, 2, 0)


def _poisoned_step(target, cls, scope, poison, tensor, element):
    shapes = [(37,), (5,) if target.interpreted else (16390,), (), (4, 3)]
    dtypes = [torch.float32, torch.float16, torch.float64, torch.bfloat16]
    params = [target.parameter(t, d) for t, d in zip(randoms(shapes), dtypes, strict=True)]
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = target.optimizer(cls, groups, scope=scope, max_grad_norm=1.0, lr=0.01)
    good = [randoms(shapes) for _ in range(2)]
    take_steps(optimizer, good[:1])
    before, cosines = snapshot(optimizer), {k: c.item() for k, c in optimizer.cosine().items()}
    bad = randoms(shapes)
    bad[tensor].view(-1)[element] = poison
    take_steps(optimizer, [bad])
    assert same_bits(snapshot(optimizer), before)
    assert optimizer.skipped_steps().item() == 1
    assert not math.isfinite(optimizer.grad_norm().item())
    assert {k: c.item() for k, c in optimizer.cosine().items()} == cosines
    take_steps(optimizer, good[1:])
    assert optimizer.skipped_steps().item() == 1
    assert math.isfinite(optimizer.grad_norm().item())
    assert all(torch.isfinite(t.float()).all() for t in snapshot(optimizer))


@pytest.mark.parametrize("init", ["zero", "clone"])
def test_non_finite_first_step_is_not_a_first_step(init, target):
    """Neither seeded nor counted: the next one is the first."""
    nan_first = [(math.nan, 1.0), (3.0, 4.0), (1.0, 0.0)]
    a, late = stepped(target, nan_first, init=init)
    b, plain = stepped(target, nan_first[1:], init=init)
    assert same_bits([a, momentum_of(late, a)], [b, momentum_of(plain, b)])
    assert late.state[a]["step"].item() == 2
    assert (late.skipped_steps().item(), plain.skipped_steps().item()) == (1, 0)


def test_non_finite_momentum_skips(target):
    """A damaged state does not spread; all three sums are checked."""
    p, optimizer = stepped(target, [(3.0, 4.0)])
    momentum_of(optimizer, p)[0] = math.inf
    before = snapshot(optimizer)
    take_steps(optimizer, [[torch.tensor([0.0, 1.0])]])
    assert same_bits(snapshot(optimizer), before)
    assert optimizer.skipped_steps().item() == 1


def test_momentum_whose_square_overflows_skips(target):
    """|m|^2 alone is infinite here; the cosine would silently be 0."""
    p, optimizer = stepped(target, [(3.0, 4.0)])
    momentum_of(optimizer, p).fill_(1e200)
    before = snapshot(optimizer)
    take_steps(optimizer, [[torch.tensor([1.0, 2.0])]])
    assert same_bits(snapshot(optimizer), before)
    assert optimizer.skipped_steps().item() == 1
    assert optimizer.grad_norm().item() == math.inf


def test_a_huge_learning_rate_is_not_a_non_finite_gradient(target):
    """Parameters may leave their range by the user's choice; only sums decide."""
    p, optimizer = stepped(target, [(3.0, 4000.0)], dtype=torch.float32, lr=1e38)
    assert optimizer.skipped_steps().item() == 0
    assert p[1].item() == -math.inf


# one-element tensor, scope="tensor"


@each_class
def test_one_element_scope_has_a_cosine_of_minus_one_zero_or_one(cls, target):
    params = [target.parameter([0.0]) for _ in range(3)]
    optimizer = target.optimizer(cls, params, scope="tensor")
    take_steps(optimizer, [[torch.tensor([0.3])] * 3, [torch.tensor([x]) for x in (0.7, -1e-5, 0.0)]])
    assert [c.item() for c in optimizer.cosine().values()] == [1, -1, 0]


# p.grad is None


@each_class
def test_parameter_without_gradient_is_left_alone(cls, target):
    """Not in the dot product, its momentum not decayed, its step not counted."""
    params = [target.parameter(t) for t in randoms([(4,), (3,)])]
    contest = Duel(target, cls, [{"params": params}], {"lr": 0.01, "weight_decay": 0.1})
    a, b = randoms([(4,), (3,)])
    contest.step([a, b])
    before = [bits(t) for t in (params[1], *contest.optimizer.state[params[1]].values())][:-1]
    contest.step([b.new_ones(4), None])
    after = [bits(t) for t in (params[1], *contest.optimizer.state[params[1]].values())][:-1]
    assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
    contest.step([-a, -b])


def test_no_gradient_at_all_is_no_step(target):
    p = target.parameter([1.0, 2.0])
    optimizer = target.optimizer(torsion.TAM, [p], weight_decay=0.5)
    optimizer.step()
    assert p.tolist() == [1, 2]
    assert not optimizer.state[p]
    assert optimizer.cosine() == {}


@pytest.mark.parametrize("scope", ["group", "tensor"])
def test_scope_without_gradients_keeps_its_correlation(scope, target):
    """Another scope goes on; this one neither decays nor counts."""
    params = [target.parameter(t) for t in randoms([(4,), (3,)])]
    contest = Duel(target, torsion.TAM, [{"params": [p]} for p in params], {"lr": 0.1, "scope": scope})
    a, b = randoms([(4,), (3,)])
    for grads in ([a, b], [a, b], [-a, None], [a, None]):
        contest.step(grads)
    assert contest.optimizer.state[params[1]]["correlation"].item() == pytest.approx(0.1)


# tensor that joins late


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@pytest.mark.parametrize("init", ["zero", "clone"])
def test_tensor_that_joins_late(init, scope, target):
    """zero: takes its scope's smoothed cosine at once. clone: seeds m = h undamped, then takes it."""
    params = [target.parameter(t) for t in randoms([(4,), (3,)])]
    keywords = {"lr": 0.1, "scope": scope, "init": init, "weight_decay": 0.1}
    contest = Duel(target, torsion.TAM, [{"params": params}], keywords)
    a, b = randoms([(4,), (3,)])
    for grads in ([a, None], [a, None], [a, b], [a, b]):
        contest.step(grads)
    if scope == "global":
        states = [contest.optimizer.state[p]["correlation"].item() for p in params]
        assert states[0] == states[1]


def test_late_clone_is_left_out_of_the_cosine_and_stays_in_the_norm(target):
    params = [target.parameter([0.0, 0.0]) for _ in range(2)]
    optimizer = target.optimizer(torsion.TAM, params, lr=0.1, init="clone", decay=0.0, max_grad_norm=1e3)
    u = torch.tensor([3.0, 4.0])
    take_steps(optimizer, [[u, None], [u, -1000 * u]])
    assert optimizer.cosine()["global"].item() == 1  # with the late gradient in |g| it would be 1/1000
    norm = 5 * math.sqrt(1 + 1e6)
    assert optimizer.grad_norm().item() == pytest.approx(norm)
    clip = 1e3 / (norm + 1e-6)
    assert momentum_of(optimizer, params[1]).tolist() == pytest.approx((-1000 * clip * u).tolist())


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_group_added_late(scope, target):
    """add_param_group in mid-run: old tensors keep their history, new ones join the scope."""
    first, second = (target.parameter(t) for t in randoms([(4,), (3,)]))
    contest = Duel(target, torsion.TAM, [{"params": [first]}], {"lr": 0.1, "scope": scope, "weight_decay": 0.1})
    a, b = randoms([(4,), (3,)])
    contest.step([a])
    contest.step([-a])
    group = {"params": [second], "lr": 0.02}
    contest.optimizer.add_param_group(dict(group))
    contest.judge.add_group(group)
    contest.params.append(second)
    contest.step([a, b])
    contest.step([a, -b])


# sparse gradient


@each_class
def test_sparse_gradient_raises_and_changes_nothing(cls, target):
    p, q = target.parameter([1.0, 2.0]), target.parameter([3.0])
    optimizer = target.optimizer(cls, [("table", p), ("bias", q)])
    q.grad = torch.ones_like(q)
    p.grad = torch.eye(2, dtype=torch.float64, device=p.device)[0].to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"table: grad is sparse .*to_dense"):
        optimizer.step()
    assert same_bits(snapshot(optimizer), before)


# maximize


@each_class
@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_maximize_negates_the_gradient_before_the_cosine(cls, scope, target):
    """maximize on g is minimize on -g, bit for bit, coupled decay (not negated) included."""
    steps = [randoms([(5,), (3,)]) for _ in range(2)]
    start = randoms([(5,), (3,)])
    runs = []
    for maximize, sign in ((True, 1), (False, -1)):
        params = [target.parameter(t) for t in start]
        optimizer = target.optimizer(cls, params, lr=0.01, weight_decay=0.1, maximize=maximize, scope=scope)
        take_steps(optimizer, [[sign * g for g in grads] for grads in steps])
        runs.append(snapshot(optimizer))
    assert same_bits(*runs)


def test_groups_may_differ_in_maximize(target):
    """Each group's gradient is turned round by its own flag; the cosine is over both."""
    params = [target.parameter(t) for t in randoms([(5,), (3,)])]
    groups = [{"params": params[:1], "maximize": True}, {"params": params[1:]}]
    contest = Duel(target, torsion.TAM, groups, {"lr": 0.1})
    a, b = randoms([(5,), (3,)])
    contest.step([a, b])
    contest.step([a, -b])


# Nesterov


def test_nesterov_is_not_offered():
    with pytest.raises(TypeError, match=r"TAM does not take nesterov=.*no Nesterov form"):
        torsion.TAM([torch.nn.Parameter(torch.zeros(1))], nesterov=True)


# The list of tests worth having, as far as no other module has them under their own name:
# golden table (test_golden.py); chunking, order, group split, gradient scale (test_invariances.py); T11 and scaled
# gradients (test_tam.py); state round trip mid-run (test_bitwise.py); checkpoints of SGD and sharding elsewhere


@each_class
@each_dtype()
def test_constant_gradient_gives_one_minus_decay_to_the_steps_before(dtype, cls, fast_target):
    """s = 1 from the second step on, so s^_t = 1 - decay^(t - 1)."""
    p = fast_target.parameter(torch.zeros(33), dtype)
    optimizer = fast_target.optimizer(cls, [p], decay=0.8, lr=0.0)
    row = tolerances.COSINE[torch.float64 if dtype == torch.float64 else torch.float32]
    g = torch.linspace(-1, 2, 33)
    for t in range(1, 30):
        take_steps(optimizer, [[g]])
        close(optimizer.state[p]["correlation"], 1 - 0.8 ** (t - 1), row, f"step {t}")


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_zero_learning_rate_moves_state_and_not_the_parameter(dtype, target):
    p = target.parameter(randoms([(9,)])[0], dtype)
    before = bits(p)
    optimizer = target.optimizer(torsion.TAM, [p], lr=0.0, weight_decay=0.1)
    take_steps(optimizer, [randoms([(9,)])])
    assert torch.equal(bits(p), before)
    assert momentum_of(optimizer, p).abs().max() > 0
