"""Taking turns: phases and closures, whose turn it is, slow weights on show, outer steps given up."""

from __future__ import annotations

import pytest
import torch
from cycles import (
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
from helpers import same_bits
from torch import nn

import torsion

SHAPES = [(4, 3), (5,), ()]
ADAPTIVE = {"alpha": "adaptive", "k": 3, "rho": 0.2}


def build(target, base=MOMENTUM, dtype=torch.float32, **settings):
    torch.manual_seed(1)
    params = [nn.Parameter(torch.randn(s, device=target.device).to(dtype)) for s in SHAPES]
    return ahead(target, base, params, **{"k": 2, "rho": 0.2, **settings})


# Closures


@pytest.mark.parametrize("k", [1, 2, 5])
@each_reuse
@each_base("sgd", "own-sgd")
def test_the_closure_is_called_once_per_evaluation(base, k, reuse, fast_target):
    run = Run(fast_target, base, {"k": k, "reuse_gradients": reuse})
    for step in range(2):
        loss = run.step(step)
        assert run.done == (k + 1 if reuse else 2 * k)
        assert torch.equal(loss, run.losses[0]), "the loss at the slow weights"
        assert len({float(x) for x in run.losses}) > 1


def test_sam_evaluates_twice(fast_target):
    run = Run(fast_target, MOMENTUM, {}, cls=torsion.SAM)
    run.step(0)
    assert run.done == 2


@each_reuse
@each_base()
def test_phases_equal_the_closure_bit_for_bit(base, reuse, compiled_target):
    chosen = {**ADAPTIVE, "reuse_gradients": reuse}
    a, b = Run(compiled_target, base, chosen), Run(compiled_target, base, chosen)
    for step in range(3):
        a.step(step)
        b.by_phases(step)
        assert same_bits(a.everything(), b.everything())


@pytest.mark.parametrize("chosen", [ADAPTIVE, {"k": 4, "alpha": 0.5}, {"k": 2, "asam": True}], ids=str)
@each_base()
def test_reused_gradients_give_the_same_bits_as_fresh_ones(base, chosen, compiled_target):
    saving, full = (Run(compiled_target, base, {**chosen, "reuse_gradients": reuse}) for reuse in (True, False))
    for step in range(3):
        assert torch.equal(saving.step(step), full.step(step))
        assert same_bits(saving.everything(), full.everything())


@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "full"])
def test_the_closure_may_be_called_with_gradients_disabled_outside(reuse, fast_target):
    run, plain = (Run(fast_target, MOMENTUM, {"reuse_gradients": reuse}) for _ in range(2))
    with torch.no_grad():
        run.step(0)
        assert not torch.is_grad_enabled()
    plain.step(0)
    assert same_bits(run.everything(), plain.everything())


def test_two_runs_give_the_same_bits(fast_target):
    a, b = Run(fast_target, MOMENTUM, ADAPTIVE), Run(fast_target, MOMENTUM, ADAPTIVE)
    for step in range(4):
        a.step(step)
        b.step(step)
    assert same_bits(a.everything(), b.everything())


# Gradients and storage


@each_reuse
@each_kind
def test_phases_leave_gradients_alone(base, reuse, fast_target):
    optimizer = build(fast_target, base, reuse_gradients=reuse, **ADAPTIVE)
    for _ in range(2):
        for phase, grads in zip(order_of(3, reuse), evaluations(optimizer, 6), strict=False):
            give(optimizer, grads)
            before = [p.grad for p in parameters_of(optimizer)]
            copies = [g.clone() for g in before]
            getattr(optimizer, phase)()
            assert all(p.grad is g for p, g in zip(parameters_of(optimizer), before, strict=True))
            assert same_bits(before, copies)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_kind
def test_parameters_keep_their_storage(base, dtype, fast_target):
    optimizer = build(fast_target, base, dtype)
    params = parameters_of(optimizer)
    places = [p.data_ptr() for p in params]
    for _ in range(2):
        for phase, grads in zip(order_of(2), evaluations(optimizer, 3), strict=True):
            give(optimizer, grads)
            getattr(optimizer, phase)()
            assert [p.data_ptr() for p in params] == places
            with optimizer.slow_weights():
                assert [p.data_ptr() for p in params] == places


def test_autograd_notices_that_parameters_changed(fast_target):
    p = nn.Parameter(torch.ones(3, device=fast_target.device))
    optimizer = ahead(fast_target, MOMENTUM, [p], k=2)
    for _ in range(2):
        for phase in order_of(2):
            loss = (p * p).sum()
            p.grad = torch.ones_like(p)
            version = p._version
            getattr(optimizer, phase)()
            assert p._version > version, phase
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()


# Slow weights


def test_edits_between_outer_steps_count(fast_target):
    """The slow weights are the parameters as they stand when an outer step begins."""
    optimizer = build(fast_target)
    phases(optimizer, evaluations(optimizer, 3), 2)
    with torch.no_grad():
        for p in parameters_of(optimizer):
            p.fill_(0.25)
    phases(optimizer, evaluations(optimizer, 2), 2)
    with optimizer.slow_weights():
        assert all(torch.equal(p, torch.full_like(p, 0.25)) for p in parameters_of(optimizer))
    optimizer.abandon()
    assert all(torch.equal(p, torch.full_like(p, 0.25)) for p in parameters_of(optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@each_reuse
@each_kind
def test_slow_weights_on_show_in_the_middle(base, reuse, dtype, fast_target):
    optimizer, undisturbed = (build(fast_target, base, dtype, reuse_gradients=reuse) for _ in range(2))
    start = values_of(optimizer)
    grads = evaluations(optimizer, len(order_of(2, reuse)))
    for j in range(1, len(grads)):
        give(optimizer, grads[j - 1])
        getattr(optimizer, order_of(2, reuse)[j - 1])()
        perturbed = values_of(optimizer)
        assert not same_bits(perturbed, start)
        with optimizer.slow_weights():
            assert same_bits(values_of(optimizer), start)
        assert same_bits(values_of(optimizer), perturbed)
    give(optimizer, grads[-1])
    optimizer.descent_step()
    phases(undisturbed, grads, 2, reuse)
    assert same_bits(everything(optimizer), everything(undisturbed))


def test_slow_weights_come_back_after_an_exception(fast_target):
    optimizer = build(fast_target)
    phases(optimizer, evaluations(optimizer, 1), 2)
    perturbed = values_of(optimizer)
    with pytest.raises(KeyError), optimizer.slow_weights():
        raise KeyError("in the evaluation")
    assert same_bits(values_of(optimizer), perturbed)


def test_slow_weights_inside_a_closure(fast_target):
    run, plain = Run(fast_target, MOMENTUM, {"k": 2}), Run(fast_target, MOMENTUM, {"k": 2})
    start, shown = run.values(), []

    def look(model, j):
        with run.optimizer.slow_weights():
            shown.append(run.values())

    run.spoil = look
    run.step(0)
    plain.step(0)
    assert len(shown) == 3
    assert all(same_bits(values, start) for values in shown)
    assert same_bits(run.everything(), plain.everything())


@each_kind
def test_slow_weights_between_outer_steps_change_nothing(base, fast_target):
    optimizer = build(fast_target, base)
    for _ in range(2):
        before = everything(optimizer)
        with optimizer.slow_weights():
            assert same_bits(everything(optimizer), before)
        assert same_bits(everything(optimizer), before)
        phases(optimizer, evaluations(optimizer, 3), 2)


def test_weights_loaded_on_show_between_outer_steps_stay(fast_target):
    """Between outer steps nothing is swapped, so what is written inside stays."""
    optimizer = build(fast_target)
    phases(optimizer, evaluations(optimizer, 3), 2)
    with optimizer.slow_weights(), torch.no_grad():
        for p in parameters_of(optimizer):
            p.fill_(0.5)
    assert all((p == 0.5).all() for p in parameters_of(optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_storage_slow_weights_and_abandoning_in_triton(dtype, triton_target):
    optimizer = build(triton_target, dtype=dtype)
    start, places = values_of(optimizer), [p.data_ptr() for p in parameters_of(optimizer)]
    phases(optimizer, evaluations(optimizer, 2), 2)
    perturbed = values_of(optimizer)
    with optimizer.slow_weights():
        assert same_bits(values_of(optimizer), start)
    assert same_bits(values_of(optimizer), perturbed)
    assert not same_bits(perturbed, start)
    optimizer.abandon()
    assert same_bits(values_of(optimizer), start)
    assert [p.data_ptr() for p in parameters_of(optimizer)] == places


# Whose turn it is


def _expected(optimizer, call, phase):
    """``call`` is refused and names ``phase``; nothing changes."""
    before = everything(optimizer)
    with pytest.raises(RuntimeError, match=phase):
        call()
    assert same_bits(everything(optimizer), before)


@each_reuse
@each_kind
def test_a_phase_out_of_turn_is_refused_and_changes_nothing(base, reuse, fast_target):
    """Every wrong call at every place, and the outer steps end as if there had been none."""
    optimizer, undisturbed = (build(fast_target, base, reuse_gradients=reuse) for _ in range(2))
    order = order_of(2, reuse)
    for _ in range(2):
        grads = evaluations(optimizer, len(order))
        for j, (phase, each) in enumerate(zip(order, grads, strict=True)):
            give(optimizer, each)
            wrong = "descent_step" if phase == "ascent_step" else "ascent_step"
            _expected(optimizer, getattr(optimizer, wrong), phase)
            if j:
                _expected(optimizer, lambda: optimizer.step(lambda: torch.zeros(())), phase)
                _expected(optimizer, optimizer.state_dict, "descent_step|abandon")
            getattr(optimizer, phase)()
        phases(undisturbed, grads, 2, reuse)
        assert same_bits(everything(optimizer), everything(undisturbed))


def test_a_phase_inside_a_closure_is_refused(fast_target):
    run = Run(fast_target, MOMENTUM, {"k": 2})
    before = run.everything()

    def intrude(model, j):
        if j == 1:
            run.optimizer.descent_step()

    run.spoil = intrude
    with pytest.raises(RuntimeError):
        run.step(0)
    assert same_bits(run.values(), before[: len(run.values())])
    run.spoil = lambda model, j: None
    run.step(0)
    assert run.done == 3


def test_a_step_inside_a_closure_is_refused(fast_target):
    run = Run(fast_target, MOMENTUM, {"k": 2})
    before = run.values()
    run.spoil = lambda model, j: run.optimizer.step(lambda: torch.zeros(()))
    with pytest.raises(RuntimeError):
        run.step(0)
    assert same_bits(run.values(), before)


# Giving up


@each_reuse
@each_kind
def test_abandon_puts_the_slow_weights_back(base, reuse, fast_target):
    """At every place; the base keeps the descents already made, and the next outer step is a whole one."""
    order = order_of(2, reuse)
    for stop in range(1, len(order)):
        optimizer = build(fast_target, base, reuse_gradients=reuse)
        start = values_of(optimizer)
        phases(optimizer, evaluations(optimizer, stop), 2, reuse)
        made = order[:stop].count("descent_step")
        kept = states_of(optimizer)
        optimizer.abandon()
        assert same_bits(values_of(optimizer), start)
        assert same_states(states_of(optimizer), kept)
        assert any(kept) == (made > 0)
        assert int(optimizer.skipped_steps()) == 0
        phases(optimizer, evaluations(optimizer, len(order)), 2, reuse)
        optimizer.state_dict()
        assert not same_bits(values_of(optimizer), start)


def test_abandon_before_a_step_and_twice_changes_nothing(fast_target):
    optimizer = build(fast_target)
    before = everything(optimizer)
    optimizer.abandon()
    phases(optimizer, evaluations(optimizer, 1), 2)
    optimizer.abandon()
    optimizer.abandon()
    assert same_bits(everything(optimizer), before)
