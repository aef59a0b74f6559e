"""Bad input to Lookbehind and SAM: the message names what came and what was expected, and nothing is half-applied."""

from __future__ import annotations

import math

import pytest
import torch
from cycles import (
    BASE,
    MOMENTUM,
    OwnSGD,
    Run,
    base_state,
    each_base,
    each_kind,
    each_reuse,
    evaluations,
    everything,
    give,
    order_of,
    parameters_of,
    phases,
    values_of,
)
from helpers import same_bits
from torch import nn

import torsion

INF, NAN = math.inf, math.nan


def parameters():
    return [nn.Parameter(torch.arange(6.0).reshape(2, 3)), nn.Parameter(torch.ones(4))]


def named():
    return list(zip(("layer.weight", "layer.bias"), parameters(), strict=True))


def build(base=MOMENTUM, **settings):
    return torsion.Lookbehind(base.build(named()), **settings)


# Constructor arguments: name, value, error, what the message must say besides name and value

COMMON = [
    ("rho", -0.1, ValueError, ">= 0"),
    ("rho", NAN, ValueError, "finite"),
    ("rho", INF, ValueError, "finite"),
    ("rho", "0.05", TypeError, "number"),
    ("rho", None, TypeError, "number"),
    ("rho", True, TypeError, "number"),
    ("eta", -1e-3, ValueError, ">= 0"),
    ("eta", NAN, ValueError, "finite"),
    ("eta", None, TypeError, "number"),
    ("asam", 1, TypeError, "True or False"),
    ("asam", "yes", TypeError, "True or False"),
    ("asam", None, TypeError, "True or False"),
    ("backend", "gpu", ValueError, "'cuda', 'triton', 'cpu', 'reference'"),
    ("backend", 3, TypeError, "'cuda', 'triton', 'cpu', 'reference'"),
    ("backend", "cuda", ValueError, "these are on cpu"),
]
LOOKBEHIND = [
    ("k", 0, ValueError, ">= 1"),
    ("k", -2, ValueError, ">= 1"),
    ("k", 2.0, TypeError, "integer"),
    ("k", 1.5, TypeError, "integer"),
    ("k", "2", TypeError, "integer"),
    ("k", True, TypeError, "integer"),
    ("k", None, TypeError, "integer"),
    ("alpha", -0.1, ValueError, "[0, 1]"),
    ("alpha", -1, ValueError, "adaptive"),
    ("alpha", 1.5, ValueError, "[0, 1]"),
    ("alpha", NAN, ValueError, "[0, 1]"),
    ("alpha", "adaptiv", ValueError, "adaptive"),
    ("alpha", "0.5", ValueError, "adaptive"),
    ("alpha", None, TypeError, "adaptive"),
    ("alpha", True, TypeError, "adaptive"),
    ("alpha", [0.5], TypeError, "adaptive"),
    ("alpha_scope", "model", ValueError, "'tensor', 'global'"),
    ("alpha_scope", None, TypeError, "'tensor', 'global'"),
    ("reuse_gradients", 0, TypeError, "True or False"),
    ("reuse_gradients", "no", TypeError, "True or False"),
]
ARGUMENTS = [(cls, *row) for cls in (torsion.Lookbehind, torsion.SAM) for row in COMMON]
ARGUMENTS += [(torsion.Lookbehind, *row) for row in LOOKBEHIND]


@pytest.mark.parametrize(
    ("cls", "name", "value", "error", "remedy"),
    ARGUMENTS,
    ids=[f"{a[0].__name__}-{a[1]}={a[2]!r}" for a in ARGUMENTS],
)
def test_argument(cls, name, value, error, remedy):
    with pytest.raises(error) as caught:
        cls(MOMENTUM.build(parameters()), **{name: value})
    message = str(caught.value)
    assert f"{name}={value!r}" in message, message
    assert remedy in message, message


@pytest.mark.parametrize("value", [0.0, 1.0, 0, 1, "adaptive"])
def test_the_ends_of_the_range_of_alpha_are_in_it(value):
    build(alpha=value, rho=0.0, eta=0.0, k=1)


NO_BASES = {
    "none": lambda: None,
    "model": lambda: nn.Linear(2, 2),
    "parameters": parameters,
    "class": lambda: torch.optim.SGD,
    "scheduler": lambda: torch.optim.lr_scheduler.StepLR(MOMENTUM.build(parameters()), 1),
}


@pytest.mark.parametrize("cls", [torsion.Lookbehind, torsion.SAM])
@pytest.mark.parametrize("what", NO_BASES.values(), ids=NO_BASES)
def test_a_base_that_is_no_optimizer(what, cls):
    with pytest.raises(TypeError, match=r"(?s)base_optimizer.*SGD"):
        cls(what())


@pytest.mark.parametrize("outer", [torsion.Lookbehind, torsion.SAM])
@pytest.mark.parametrize("inner", [torsion.Lookbehind, torsion.SAM])
def test_a_base_that_is_itself_lookbehind(inner, outer):
    with pytest.raises((TypeError, ValueError), match=inner.__name__):
        outer(inner(MOMENTUM.build(parameters())))


@pytest.mark.parametrize("name", ["k", "alpha", "alpha_scope", "reuse_gradients"])
def test_sam_does_not_take_what_it_fixes(name):
    with pytest.raises(TypeError, match=name):
        torsion.SAM(MOMENTUM.build(parameters()), **{name: 1})


@pytest.mark.parametrize("cls", [torsion.Lookbehind, torsion.SAM])
def test_an_unknown_argument_is_named(cls):
    for name in ("lr", "radius", "adaptive"):
        with pytest.raises(TypeError, match=name):
            cls(MOMENTUM.build(parameters()), **{name: 0.1})


@pytest.mark.parametrize("value", [1, "yes", 0.5])
def test_a_groups_word_on_asam_that_is_none(value):
    with pytest.raises((TypeError, ValueError), match="asam_scaled") as caught:
        torsion.Lookbehind(MOMENTUM.build([{"params": parameters(), "asam_scaled": value}]), asam=True)
    assert repr(value) in str(caught.value)


def test_the_environment_names_a_back_end_that_is_none(monkeypatch):
    monkeypatch.setenv("TORSION_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"TORSION_BACKEND='fast'.*cuda, triton, cpu, reference"):
        build()
    build(backend="reference")


# Closures


@each_base("sgd-momentum", "own-sgd")
def test_no_closure(base):
    """The message names both ways out."""
    optimizer = build(base)
    give(optimizer, evaluations(optimizer, 1)[0])
    before = everything(optimizer)
    with pytest.raises((RuntimeError, TypeError), match="closure") as caught:
        optimizer.step()
    assert "ascent_step" in str(caught.value)
    assert same_bits(everything(optimizer), before)
    phases(optimizer, evaluations(optimizer, 3), 2)


@each_reuse
@each_kind
def test_a_closure_that_returns_nothing_at_any_evaluation(base, reuse, fast_target):
    settings = {"k": 2, "reuse_gradients": reuse}
    for at in range(len(order_of(2, reuse))):
        run, control = Run(fast_target, base, settings), Run(fast_target, base, settings)
        start, calls = run.values(), 0
        good = run.closure(0)

        def closure(at=at, good=good):
            nonlocal calls
            calls += 1
            loss = good()
            return None if calls == at + 1 else loss

        with pytest.raises((RuntimeError, TypeError), match=r"(?s)None.*loss"):
            run.optimizer.step(closure)
        assert same_bits(run.values(), start)
        again = control.closure(0)
        for phase in order_of(2, reuse)[:at]:
            again()
            getattr(control.optimizer, phase)()
        control.optimizer.abandon()
        assert same_bits(run.everything(), control.everything())
        assert int(run.optimizer.skipped_steps()) == 0
        run.step(1)
        control.step(1)
        assert same_bits(run.everything(), control.everything())


# Gradients that come and go within an outer step


@pytest.mark.parametrize("explicit", [False, True], ids=["closure", "phases"])
@pytest.mark.parametrize("change", ["lost", "gained"])
@each_reuse
@each_kind
def test_which_parameters_have_gradients_may_not_change(base, reuse, change, explicit, fast_target):
    """At every later evaluation; the message names the parameter, the weights are the slow ones afterwards."""
    settings = {"k": 2, "reuse_gradients": reuse}
    for at in range(1, len(order_of(2, reuse))):
        run = Run(fast_target, base, settings)
        run.step(0)
        start = run.values()

        def spoil(model, j, at=at):
            if (j < at) == (change == "gained"):
                model[2].bias.grad = None

        run.spoil = spoil
        with pytest.raises((RuntimeError, ValueError), match=r"2\.bias.*gradient"):
            (run.by_phases if explicit else run.step)(1)
        assert same_bits(run.values(), start)
        assert int(run.optimizer.skipped_steps()) == 0
        run.optimizer.state_dict()
        run.spoil = lambda model, j: None
        run.step(2)
        assert not same_bits(run.values(), start)


def test_they_may_change_between_outer_steps(fast_target):
    run = Run(fast_target, MOMENTUM, {"k": 2})
    frozen = run.model[2].bias

    def lose(model, j):
        frozen.grad = None

    for step in range(4):
        held = frozen.detach().clone()
        run.spoil = lose if step % 2 else lambda model, j: None
        run.step(step)
        assert torch.equal(frozen, held) == bool(step % 2)


# Gradients that do not fit: what to do to the second parameter, the error


def _sparse(p):
    p.grad = torch.ones(4).to_sparse()


def _wrong_shape(p):
    p.grad = torch.ones(4)
    p.data = torch.ones(5)


def _wrong_dtype(p):
    p.grad = torch.ones(4)
    p.data = torch.ones(4, dtype=torch.bfloat16)


def _complex(p):
    p.data = torch.ones(4, dtype=torch.complex64)
    p.grad = torch.ones(4, dtype=torch.complex64)


def _expanded(p):
    p.data = torch.ones(1).expand(4)
    p.grad = torch.ones(4)


SPOILT = {
    "sparse": (_sparse, RuntimeError, "sparse"),
    "wrong-shape": (_wrong_shape, ValueError, r"shape \(4,\).*\(5,\)"),
    "wrong-dtype": (_wrong_dtype, TypeError, "float32.*bfloat16"),
    "complex": (_complex, TypeError, "complex"),
    "expanded": (_expanded, ValueError, "share memory"),
}


@pytest.mark.parametrize(("spoil", "error", "found"), SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@each_base("sgd-momentum", "tam", "own-sgd")
def test_a_gradient_that_does_not_fit(base, backend, at, spoil, error, found):
    """At the first ascent nothing has changed; later the parameters are the slow weights, the descents stay made."""
    optimizer = build(base, k=3, backend=backend)
    bad = parameters_of(optimizer)[1]
    phases(optimizer, evaluations(optimizer, 4), 3)
    start = values_of(optimizer)
    phases(optimizer, evaluations(optimizer, at), 3)
    states = base_state(optimizer)
    give(optimizer, evaluations(optimizer, 1)[0])
    held, bad.grad = bad.data, None
    spoil(bad)
    # What became of the parameter within an outer step is found before its gradient is looked at.
    with pytest.raises((error, RuntimeError, ValueError, TypeError), match=rf"(?s)^layer\.bias: .*({found}|became)"):
        getattr(optimizer, order_of(3)[at])()
    bad.grad = None
    if bad.data_ptr() != held.data_ptr():
        bad.data = held.copy_(start[1])
    assert same_bits(values_of(optimizer), start)
    assert same_bits(base_state(optimizer), states)
    assert int(optimizer.skipped_steps()) == 0
    phases(optimizer, evaluations(optimizer, 4), 3)


def test_two_parameters_over_one_memory():
    shared = torch.ones(4)
    for cls in (torch.optim.SGD, OwnSGD):
        inner = cls([("a", nn.Parameter(shared)), ("b", nn.Parameter(shared.view(2, 2)))], lr=0.1)
        optimizer = torsion.Lookbehind(inner)
        give(optimizer, [torch.ones(4), torch.ones(2, 2)])
        with pytest.raises(ValueError, match=r"^b: shares memory"):
            optimizer.ascent_step()
        assert torch.equal(shared, torch.ones(4))


@pytest.mark.parametrize("wrong", [("lr", -1.0), ("weight_decay", NAN), ("lr", NAN)], ids=str)
@each_base("sgd-momentum", "adam", "tam")
def test_a_group_value_changed_to_nonsense_is_refused(base, wrong):
    """Before anything is written, at whichever phase it is found first."""
    optimizer = build(base)
    phases(optimizer, evaluations(optimizer, 3), 2)
    start, states = values_of(optimizer), base_state(optimizer)
    key, value = wrong
    old, optimizer.param_groups[0][key] = optimizer.param_groups[0][key], value
    with pytest.raises(ValueError, match=f"{key}={value!r}"):
        phases(optimizer, evaluations(optimizer, 3), 2)
    assert same_bits(values_of(optimizer), start)
    assert same_bits(base_state(optimizer), states)
    optimizer.param_groups[0][key] = old
    optimizer.abandon()
    phases(optimizer, evaluations(optimizer, 3), 2)


def test_a_base_whose_own_step_raises(fast_target):
    """The exception passes, the weights are the slow ones, the outer step is over."""

    class Failing(OwnSGD):
        left = 2

        def step(self, closure=None):
            self.left -= 1
            if self.left < 0:
                raise ArithmeticError("out of steps")
            return super().step(closure)

    run = Run(fast_target, BASE["own-sgd"], {"k": 3})
    run.optimizer = fast_target.optimizer(torsion.Lookbehind, Failing(run.model.parameters(), lr=0.1), k=3)
    start = run.values()
    with pytest.raises(ArithmeticError, match="out of steps"):
        run.step(0)
    assert same_bits(run.values(), start)
    run.optimizer.base_optimizer.left = 9
    run.step(1)
    assert not same_bits(run.values(), start)
