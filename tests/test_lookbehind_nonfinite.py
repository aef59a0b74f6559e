"""A gradient that is not finite, at every evaluation: the outer step is given up and counted, the next one is whole."""

from __future__ import annotations

import pytest
import torch
from cycles import (
    BASE,
    MOMENTUM,
    Run,
    ahead,
    each_base,
    each_kind,
    each_reuse,
    evaluations,
    everything,
    give,
    order_of,
    parameters_of,
    phases,
    same_states,
    states_of,
    values_of,
)
from helpers import CHUNK, same_bits
from torch import nn

import torsion

NAN, INF = float("nan"), float("inf")
K = 3
FULL = len(order_of(K, reuse=False))
SHAPES = [(4, 3), (5,), ()]


def build(target, base=MOMENTUM, dtype=torch.float32, shapes=SHAPES, **settings):
    torch.manual_seed(1)
    params = [nn.Parameter(torch.randn(s, device=target.device).to(dtype)) for s in shapes]
    return ahead(target, base, params, **{"k": K, "rho": 0.2, **settings})


def spoiled(grads, at, value=NAN):
    """The same evaluations with one element of one tensor of one of them replaced."""
    copies = [[g.clone() for g in each] for each in grads]
    copies[at][1].view(-1)[-1] = value
    return copies


def compared(optimizer, control, grads, bad, reuse=True):
    """Outer step ``bad`` on ``optimizer`` is as the finite part of it, given up; then both go on alike."""
    start = values_of(optimizer)
    at = next(j for j, each in enumerate(bad) if not all(g.isfinite().all() for g in each))
    phases(control, grads[:at], K, reuse)
    control.abandon()
    before = int(optimizer.skipped_steps())
    phases(optimizer, bad, K, reuse)
    assert same_bits(values_of(optimizer), start)
    assert same_states(states_of(optimizer), states_of(control))
    assert int(optimizer.skipped_steps()) == before + 1
    optimizer.state_dict()  # the outer step is over
    for _ in range(2):
        more = evaluations(optimizer, len(bad))
        for o in (optimizer, control):
            phases(o, more, K, reuse)
        assert same_bits(everything(optimizer), everything(control))
    assert not same_bits(values_of(optimizer), start)
    assert int(optimizer.skipped_steps()) == before + 1


@pytest.mark.parametrize(("reuse", "at"), [(True, j) for j in range(K + 1)] + [(False, j) for j in range(FULL)])
@each_kind
def test_at_every_evaluation(base, reuse, at, fast_target):
    """In the first outer step, before the base has any state, and in the second."""
    for warm, value in ((0, NAN), (1, -INF)):
        optimizer, control = (build(fast_target, base, reuse_gradients=reuse) for _ in range(2))
        for _ in range(warm):
            grads = evaluations(optimizer, len(order_of(K, reuse)))
            for o in (optimizer, control):
                phases(o, grads, K, reuse)
        grads = evaluations(optimizer, len(order_of(K, reuse)))
        compared(optimizer, control, grads, spoiled(grads, at, value), reuse)


@pytest.mark.parametrize("alpha", ["adaptive", 1.0])
@each_base()
def test_with_every_base(base, alpha, compiled_target):
    for at in (0, 1, K):
        optimizer, control = (build(compiled_target, base, alpha=alpha) for _ in range(2))
        grads = evaluations(optimizer, K + 1)
        compared(optimizer, control, grads, spoiled(grads, at))


@pytest.mark.parametrize("at", range(K + 1))
def test_in_triton(at, triton_target):
    """Parameters, count and whether the base has state; the rest is common to all back ends."""
    optimizer = build(triton_target, alpha="adaptive", shapes=[(5,), (7,)])
    start = values_of(optimizer)
    phases(optimizer, spoiled(evaluations(optimizer, K + 1), at), K)
    assert same_bits(values_of(optimizer), start)
    assert int(optimizer.skipped_steps()) == 1
    assert any(states_of(optimizer)) == (at > 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("at", [0, 2, K])
@each_kind
def test_in_every_dtype(base, at, dtype, fast_target):
    optimizer, control = (build(fast_target, base, dtype, asam=True) for _ in range(2))
    grads = evaluations(optimizer, K + 1)
    compared(optimizer, control, grads, spoiled(grads, at, INF))


@pytest.mark.parametrize("at", [0, 1, K])
@each_kind
def test_in_the_last_element_of_large_tensors(base, at, compiled_target):
    """Nothing is written before everything has been read."""
    optimizer, control = (build(compiled_target, base, shapes=[(7,), (2 * CHUNK + 5,)]) for _ in range(2))
    grads = evaluations(optimizer, K + 1)
    compared(optimizer, control, grads, spoiled(grads, at))


def test_sam(fast_target):
    for at in (0, 1):
        base = MOMENTUM.build([fast_target.parameter([1.0, -2.0], torch.float32)])
        optimizer = fast_target.optimizer(torsion.SAM, base, rho=0.1)
        for j in (0, 1):
            give(optimizer, [torch.tensor([1.0, NAN if j == at else 3.0])])
            getattr(optimizer, order_of(1)[j])()
        assert values_of(optimizer)[0].tolist() == [1.0, -2.0]
        assert states_of(optimizer) == [{}]
        assert int(optimizer.skipped_steps()) == 1


@each_kind
def test_the_remaining_phases_do_nothing(base, fast_target):
    """From the bad gradient on the parameters are the slow weights, whatever gradients follow."""
    for at in range(K + 1):
        optimizer = build(fast_target, base)
        start = values_of(optimizer)
        grads = spoiled(evaluations(optimizer, K + 1), at)
        kept = None
        for j, (phase, each) in enumerate(zip(order_of(K), grads, strict=True)):
            give(optimizer, each)
            getattr(optimizer, phase)()
            if j >= at:
                assert same_bits(values_of(optimizer), start), (at, j)
                kept = kept if kept is not None else states_of(optimizer)
                assert same_states(states_of(optimizer), kept)
                with optimizer.slow_weights():
                    assert same_bits(values_of(optimizer), start)
                assert same_bits(values_of(optimizer), start)
        assert int(optimizer.skipped_steps()) == 1


@each_kind
def test_several_bad_gradients_of_one_outer_step_count_once(base, fast_target):
    optimizer, control = build(fast_target, base), build(fast_target, base)
    grads = evaluations(optimizer, K + 1)
    compared(optimizer, control, grads, spoiled(spoiled(grads, 1), 3, INF))
    phases(optimizer, [[torch.full_like(g, NAN) for g in each] for each in grads], K)
    assert int(optimizer.skipped_steps()) == 2


def test_zero_radius_and_zero_rate_do_not_hide_a_bad_gradient(fast_target):
    for settings, rate in (({"rho": 0.0}, 0.1), ({"alpha": 0.0}, 0.1), ({}, 0.0)):
        for at in range(K + 1):
            params = [fast_target.parameter([1.0, -2.0], torch.float32)]
            optimizer = ahead(fast_target, BASE["sgd"], [{"params": params, "lr": rate}], k=K, **settings)
            for j, phase in enumerate(order_of(K)):
                give(optimizer, [torch.tensor([1.0, NAN if j == at else 3.0])])
                getattr(optimizer, phase)()
            assert values_of(optimizer)[0].tolist() == [1.0, -2.0]
            assert int(optimizer.skipped_steps()) == 1


@each_reuse
@each_kind
def test_through_a_closure(base, reuse, fast_target):
    """``step`` returns the first loss all the same, and calls the closure no less often."""
    for at in range(4 if reuse else 6):
        run = Run(fast_target, base, {"k": 3, "reuse_gradients": reuse})
        run.step(0)
        start = run.values()

        def spoil(model, j, at=at):
            if j == at:
                model[0].weight.grad[0, 0] = NAN

        run.spoil = spoil
        loss = run.step(1)
        assert torch.equal(loss, run.losses[0])
        assert loss.isfinite()
        assert same_bits(run.values(), start)
        assert int(run.optimizer.skipped_steps()) == 1
        run.spoil = lambda model, j: None
        run.step(2)
        assert not same_bits(run.values(), start)
        assert all(v.isfinite().all() for v in run.everything())


def test_the_count_is_a_tensor_of_no_dimensions(fast_target):
    optimizer = build(fast_target)
    count = optimizer.skipped_steps()
    assert count.shape == ()
    assert not count.dtype.is_floating_point
    assert count.device.type == fast_target.device
    assert int(count) == 0


def test_a_finite_gradient_whose_square_is_not(fast_target):
    """1e30 is a float32, its square is not; the sums are taken in float64."""
    optimizer = build(fast_target, BASE["sgd"])
    start = values_of(optimizer)
    give(optimizer, [torch.full_like(p, 1e30) for p in parameters_of(optimizer)])
    optimizer.ascent_step()
    n = sum(p.numel() for p in start)
    for p, s in zip(values_of(optimizer), start, strict=True):
        assert torch.allclose(p, s + 0.2 / n**0.5, rtol=1e-6)
    assert int(optimizer.skipped_steps()) == 0


# Closures that raise


@each_reuse
@each_kind
def test_a_closure_that_raises_at_every_evaluation(base, reuse, fast_target):
    """The exception passes, the weights are the slow ones, nothing is counted, finite descents made are kept."""
    order = order_of(3, reuse)
    for at in range(len(order)):
        chosen = {"k": 3, "reuse_gradients": reuse}
        run, control = Run(fast_target, base, chosen), Run(fast_target, base, chosen)
        for r in (run, control):
            r.step(0)
        start, closure = run.values(), control.closure(1)

        def spoil(model, j, at=at):
            if j == at:
                raise KeyError("no batch left")

        run.spoil = spoil
        with pytest.raises(KeyError, match="no batch left"):
            run.step(1)
        for phase in order[:at]:
            closure()
            getattr(control.optimizer, phase)()
        control.optimizer.abandon()
        assert same_bits(run.values(), start)
        assert same_bits(run.everything(), control.everything())
        assert int(run.optimizer.skipped_steps()) == 0
        run.spoil = lambda model, j: None
        for r in (run, control):
            r.step(2)
        assert same_bits(run.everything(), control.everything())


def test_an_interrupt_passes_through_as_well(fast_target):
    run = Run(fast_target, MOMENTUM, {"k": 2})
    start = run.values()

    def interrupt(model, j):
        if j == 2:
            raise KeyboardInterrupt

    run.spoil = interrupt
    with pytest.raises(KeyboardInterrupt):
        run.step(0)
    assert same_bits(run.values(), start)
    run.optimizer.state_dict()
