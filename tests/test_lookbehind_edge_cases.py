"""Identities and edge cases: what equals SAM, what equals SGD, what must not move, and how small things are blended."""

from __future__ import annotations

import pytest
import tolerances
import torch
from cycles import (
    ADAMW,
    BASE,
    MOMENTUM,
    SGD,
    Base,
    Run,
    ahead,
    base_state,
    each_base,
    each_kind,
    each_reuse,
    evaluations,
    everything,
    give,
    parameters_of,
    phases,
    values_of,
)
from helpers import each_dtype, same_bits
from tolerances import Row, close
from torch import nn

import torsion

SHAPES = [(4, 3), (5,), ()]


def build(target, base=MOMENTUM, dtype=torch.float32, **settings):
    torch.manual_seed(1)
    params = [nn.Parameter(torch.randn(s, device=target.device).to(dtype)) for s in SHAPES]
    return ahead(target, base, params, **{"k": 2, "rho": 0.2, **settings})


# Identities


@pytest.mark.parametrize("asam", [False, True], ids=["sam", "asam"])
@each_base()
def test_one_inner_step_taken_whole_is_sam(base, asam, compiled_target):
    one = Run(compiled_target, base, {"k": 1, "alpha": 1.0, "rho": 0.3, "asam": asam})
    sam = Run(compiled_target, base, {"rho": 0.3, "asam": asam}, cls=torsion.SAM)
    for step in range(3):
        assert torch.equal(one.step(step), sam.step(step))
        assert same_bits(one.everything(), sam.everything())


@each_base("sgd-momentum", "adamw", "own-sgd")
def test_sam_is_the_gradient_found_uphill_applied_at_the_weights(base, fast_target):
    """By hand: perturb, differentiate, put the weights back, let torch's optimizer step."""
    run = Run(fast_target, base, {"rho": 0.3}, torch.float64, cls=torsion.SAM)
    plain = Run(fast_target, base, {"rho": 0.3}, torch.float64)
    theirs = (ADAMW if base.id == "adamw" else SGD)(plain.model.parameters(), **base.options)
    for step in range(4):
        run.step(step)
        start = [p.detach().clone() for p in plain.model.parameters()]
        plain.closure(step)()
        length = torch.cat([p.grad.flatten() for p in plain.model.parameters()]).norm()
        with torch.no_grad():
            for p in plain.model.parameters():
                p.add_(0.3 * p.grad / length)
        plain.closure(step)()
        with torch.no_grad():
            for p, s in zip(plain.model.parameters(), start, strict=True):
                p.copy_(s)
        theirs.step()
        for p, q in zip(run.model.parameters(), plain.model.parameters(), strict=True):
            close(p, q, tolerances.REORDERED, f"step {step}")


@each_kind
def test_adaptive_alpha_of_one_inner_step_is_sam(base, fast_target):
    """f_1 = f_k: the cosine is 1 but for rounding."""
    adaptive = Run(fast_target, base, {"k": 1, "alpha": "adaptive"}, torch.float64)
    sam = Run(fast_target, base, {}, torch.float64, cls=torsion.SAM)
    for step in range(3):
        adaptive.step(step)
        sam.step(step)
        for a, b in zip(adaptive.values(), sam.values(), strict=True):
            close(a, b, tolerances.STATE[torch.float64])


@pytest.mark.parametrize("k", [1, 2, 4])
@each_reuse
@each_base("sgd", "own-plain-sgd")
def test_no_radius_and_one_kth_of_the_way_is_sgd(base, k, reuse, fast_target):
    """k descents with one gradient, and 1/k of them."""
    lookbehind = Run(fast_target, base, {"k": k, "rho": 0.0, "alpha": 1 / k, "reuse_gradients": reuse}, torch.float64)
    plain = Run(fast_target, base, {}, torch.float64)
    theirs = SGD(plain.model.parameters(), **base.options)
    for step in range(5):
        lookbehind.step(step)
        plain.closure(step)()
        theirs.step()
        for p, q in zip(lookbehind.values(), plain.values(), strict=True):
            close(p, q, tolerances.STATE[torch.float64], f"step {step}")


@each_base("sgd-momentum", "adamw", "tam", "own-sgd")
def test_the_whole_way_is_the_fast_weights(base, fast_target):
    """rho = 0, alpha = 1: k steps of the base with the gradients given, bit for bit."""
    optimizer, plain = build(fast_target, base, k=3, rho=0.0, alpha=1.0), build(fast_target, base)
    theirs = plain.base_optimizer
    for _ in range(3):
        grads = evaluations(optimizer, 4)
        phases(optimizer, grads, 3)
        for each in grads[1:]:
            give(plain, each)
            theirs.step()
        for a, b in zip(everything(optimizer), everything(plain), strict=True):
            close(a, b, tolerances.STATE[torch.float32])


def test_ascending_steps_add_up(fast_target):
    """k steps along one gradient end k rho away from the slow weights."""
    optimizer = build(fast_target, BASE["sgd"], torch.float64, k=4, rho=0.25)
    start, grads = values_of(optimizer), evaluations(optimizer, 1)[0]
    for j in range(4):
        give(optimizer, grads)
        optimizer.ascent_step() if j == 0 else optimizer.descent_step()
        moved = torch.cat([(p - s).flatten() for p, s in zip(values_of(optimizer), start, strict=True)])
        assert moved.norm().item() == pytest.approx(0.25 * (j + 1), rel=1e-12)


# Nothing to climb, nothing to descend


@pytest.mark.parametrize("asam", [False, True], ids=["sam", "asam"])
@each_dtype()
@each_base("sgd", "own-plain-sgd")
def test_a_zero_gradient_moves_nothing_uphill(base, dtype, asam, fast_target):
    optimizer = build(fast_target, base, dtype, asam=asam)
    start = values_of(optimizer)
    for j in range(3):
        give(optimizer, [torch.zeros_like(p) for p in start])
        optimizer.ascent_step() if j == 0 else optimizer.descent_step()
        assert same_bits(values_of(optimizer), start)
    assert int(optimizer.skipped_steps()) == 0


@pytest.mark.parametrize("length", [1e-17, 1e-16, 1e-15])
@each_base("sgd", "own-plain-sgd")
def test_a_gradient_as_short_as_the_offset_of_its_norm(base, length, fast_target):
    """|a| + 1e-16, the offset of the published code: a gradient of that length climbs half the radius."""
    params = [nn.Parameter(torch.zeros(4, dtype=torch.float64, device=fast_target.device))]
    optimizer = ahead(fast_target, base, params, k=1, rho=0.2)
    give(optimizer, [torch.full((4,), length / 2, dtype=torch.float64)])
    optimizer.ascent_step()
    expected = torch.tensor(0.2 * length / (length + 1e-16), dtype=torch.float64)
    close(params[0].norm(), expected, tolerances.STATE[torch.float64])


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 0.8, 1.0, "adaptive"])
@each_dtype()
@each_base("sgd-momentum", "adam", "tam", "own-sgd")
def test_without_a_rate_the_weights_stay_bit_for_bit(base, alpha, dtype, fast_target):
    """Restored by copy, blended as torch.lerp does: 3214 entries, none moves."""
    p = nn.Parameter(torch.randn(3214, device=fast_target.device).to(dtype))
    optimizer = ahead(fast_target, base, [{"params": [p], "lr": 0.0}], k=3, rho=0.5, alpha=alpha)
    start = p.detach().clone()
    for _ in range(2):
        phases(optimizer, evaluations(optimizer, 4), 3)
        assert same_bits([p.detach()], [start])
    assert all(t.isfinite().all() for t in base_state(optimizer))


@each_dtype()
@each_kind
def test_no_part_of_the_way_restores_the_weights_bit_for_bit(base, dtype, fast_target):
    p = nn.Parameter(torch.randn(3214, device=fast_target.device).to(dtype))
    optimizer = ahead(fast_target, base, [p], k=2, rho=0.5, alpha=0.0)
    start = p.detach().clone()
    phases(optimizer, evaluations(optimizer, 3), 2)
    assert same_bits([p.detach()], [start])
    assert base_state(optimizer)


@pytest.mark.parametrize("alpha_scope", ["tensor", "global"])
def test_zero_displacement_has_a_cosine_of_zero(alpha_scope, fast_target):
    """f_k comes back to s: 0/0 is 0 and no NaN, whatever the other tensors do."""
    back = fast_target.parameter([1.0, 2.0])
    other = fast_target.parameter([0.0, 0.0])
    optimizer = ahead(fast_target, plain_sgd(0.5), [back, other], k=2, alpha="adaptive", alpha_scope=alpha_scope)
    zero, one = torch.zeros(2), torch.tensor([2.0, 0.0])
    phases(optimizer, [[zero, one], [torch.ones(2), one], [-torch.ones(2), one]], 2)
    assert back.tolist() == [1.0, 2.0]
    # other: f_1 = (-1, 0), f_2 = (-2, 0)
    cosine = 1.0 if alpha_scope == "tensor" else 2.0 / (1.5**0.5 * 2.0)
    close(other, torch.tensor([-2.0 * (1 + cosine) / 2, 0.0], dtype=torch.float64), tolerances.STATE[torch.float64])


def plain_sgd(lr):
    return Base("sgd", SGD, {"lr": lr})


@pytest.mark.parametrize("alpha_scope", ["tensor", "global"])
@pytest.mark.parametrize(
    ("rate", "dtype"), [(1e-12, torch.float64), (1e-100, torch.float64), (1e-20, torch.float32)], ids=str
)
@each_base("sgd", "own-plain-sgd")
def test_tiny_displacements_have_their_exact_cosine(base, rate, dtype, alpha_scope, fast_target):
    """torch's cosine clamps norms at 1e-8 and would give alpha = 1/2."""
    p = fast_target.parameter([0.0, 0.0], dtype)
    chosen = {"k": 2, "rho": 0.0, "alpha": "adaptive", "alpha_scope": alpha_scope}
    optimizer = ahead(fast_target, base, [{"params": [p], "lr": rate}], **chosen)
    phases(optimizer, [[torch.zeros(2)], [torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 1.0])]], 2)
    expected = torch.full((2,), -rate * (1 + 0.5**0.5) / 2, dtype=torch.float64)
    row = {torch.float64: Row(1e-13, why="a few operations"), torch.float32: Row(1e-6, why="24 bits")}
    close(p, expected, row[dtype])


@each_base("sgd", "own-plain-sgd")
def test_a_cosine_never_exceeds_one(base, fast_target):
    """Parallel descents of 200 tensors: rounded sums, yet none goes past its fast weights."""
    runs = []
    for alpha in ("adaptive", 1.0):
        params = [fast_target.parameter(torch.zeros(200 + i)) for i in range(200)]
        runs.append(ahead(fast_target, base, params, k=2, alpha=alpha))
    first = evaluations(runs[0], 1)[0]
    grads = [first, first, [1.7 * g for g in first]]
    for optimizer in runs:
        phases(optimizer, grads, 2)
    for blended, fast in zip(values_of(runs[0]), values_of(runs[1]), strict=True):
        assert (blended.abs() <= fast.abs()).all()
        close(blended, fast, tolerances.STATE[torch.float64])


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize(("second", "alpha"), [(0.5, 1.0), (-3.0, 0.0), (-1.0, 0.5)])
@each_base("sgd", "own-plain-sgd")
def test_one_element_goes_all_the_way_nowhere_or_half(base, second, alpha, shape, fast_target):
    """Per tensor a cosine of numbers is -1, 0 or 1."""
    p, q = (fast_target.parameter(torch.full(shape, 0.75)) for _ in range(2))
    adaptive = ahead(fast_target, base, [{"params": [p], "lr": 0.25}], k=2, alpha="adaptive")
    fixed = ahead(fast_target, base, [{"params": [q], "lr": 0.25}], k=2, alpha=alpha)
    for optimizer in (adaptive, fixed):
        phases(optimizer, [[torch.ones(shape)], [torch.ones(shape)], [torch.full(shape, second)]], 2)
    assert torch.equal(p, q)


def test_only_empty_tensors(target):
    optimizer = ahead(target, MOMENTUM, [target.parameter(torch.zeros(s)) for s in [(0,), (3, 0, 2)]], alpha="adaptive")
    for _ in range(2):
        phases(optimizer, evaluations(optimizer, 3), 2)
    assert int(optimizer.skipped_steps()) == 0


# Who is perturbed


@each_reuse
@each_kind
def test_parameters_outside_the_optimizer_are_not_touched(base, reuse, fast_target):
    """The author's code perturbs the whole model and never puts these back."""
    run = Run(fast_target, base, {"k": 2, "rho": 0.5, "reuse_gradients": reuse})
    outside = run.model[2]
    inside = base.build(run.model[0].parameters())
    run.optimizer = fast_target.optimizer(torsion.Lookbehind, inside, **run.settings)
    before = [p.detach().clone() for p in outside.parameters()]
    moved = []
    run.spoil = lambda model, j: moved.append(same_bits([p.detach() for p in outside.parameters()], before))
    for step in range(5):
        run.step(step)
        outside.zero_grad()
    assert all(moved)
    assert len(moved) == 5 * run.evaluations
    assert same_bits([p.detach() for p in outside.parameters()], before)


@each_kind
def test_a_frozen_parameter_stays_and_is_not_in_the_norm(base, fast_target):
    """As if it were not in the optimizer; once thawed it takes part."""
    frozen, without = Run(fast_target, base, {"k": 2}), Run(fast_target, base, {"k": 2})
    for run in (frozen, without):
        run.model[0].weight.requires_grad_(False)
    start = frozen.model[0].weight.detach().clone()
    kept = [p for p in without.model.parameters() if p.requires_grad]
    without.optimizer = fast_target.optimizer(torsion.Lookbehind, base.build(kept), k=2)
    for step in range(3):
        frozen.step(step)
        without.step(step)
        assert same_bits(
            [p.detach() for p in frozen.model.parameters()], [p.detach() for p in without.model.parameters()]
        )
    assert torch.equal(frozen.model[0].weight, start)
    frozen.model[0].weight.requires_grad_(True)
    frozen.step(3)
    assert not torch.equal(frozen.model[0].weight, start)


def test_no_gradient_at_all_is_an_outer_step_of_nothing(fast_target):
    optimizer = build(fast_target)
    before = everything(optimizer)
    optimizer.zero_grad()
    optimizer.ascent_step()
    optimizer.descent_step()
    optimizer.descent_step()
    assert same_bits(everything(optimizer), before)


# The direction of improvement


@each_base("sgd-maximize", "adam-maximize", "adatamw", "own-sgd-maximize")
def test_maximizing_climbs_down_and_steps_up(base, fast_target):
    """With every gradient turned round and without ``maximize`` it is the same run."""
    optimizer = build(fast_target, base, torch.float64)
    turned = build(fast_target, Base(base.id, base.cls, {**base.options, "maximize": False}), torch.float64)
    for _ in range(2):
        grads = evaluations(optimizer, 3)
        for phase, each in zip(("ascent_step", "descent_step", "descent_step"), grads, strict=True):
            give(optimizer, each)
            give(turned, [-g for g in each])
            getattr(optimizer, phase)()
            getattr(turned, phase)()
            for a, b in zip(values_of(optimizer), values_of(turned), strict=True):
                close(a, b, tolerances.STATE[torch.float64])


# The rate


@pytest.mark.parametrize("place", ["cpu", "device"])
@each_base("sgd-momentum", "adamw", "tam", "own-sgd")
def test_a_rate_in_a_tensor(base, place, fast_target):
    plain = build(fast_target, base)
    rate = torch.tensor(base.options["lr"], device="cpu" if place == "cpu" else fast_target.device)
    tensor = build(fast_target, Base(base.id, base.cls, {**base.options, "lr": rate}, base.fused))
    for scale in (1.0, 0.5):
        rate.mul_(scale)
        plain.param_groups[0]["lr"] = float(rate)
        grads = evaluations(plain, 3)
        for o in (plain, tensor):
            phases(o, grads, 2)
        for a, b in zip(values_of(plain), values_of(tensor), strict=True):
            close(a, b, tolerances.STATE[torch.float32])
    assert tensor.param_groups[0]["lr"] is rate
    assert parameters_of(tensor)
