"""Checkpoints at the boundaries of outer steps: what is in them, who loads them, and that runs go on bit for bit."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from checkpoints import through_a_file
from cycles import BASE, MOMENTUM, each_base, each_kind, evaluations, everything, give, parameters_of, phases, values_of
from helpers import same_bits
from torch import nn

import torsion

SHAPES = [(4, 3), (5,), ()]
BARE = ("sgd", "own-plain-sgd")  # without momentum there is no state


def build(base=MOMENTUM, like=None, cls=torsion.Lookbehind, target=None, **settings):
    """Over fresh parameters, or over copies of those of ``like``."""
    torch.manual_seed(1)
    device = target.device if target else "cpu"
    values = values_of(like) if like is not None else [torch.randn(s, device=device) for s in SHAPES]
    inner = base.build([nn.Parameter(v.clone()) for v in values])
    return target.optimizer(cls, inner, **settings) if target else cls(inner, **settings)


def running(base=MOMENTUM, outer=2, **settings):
    optimizer = build(base, **settings)
    go_on(optimizer, outer=outer)
    return optimizer


def go_on(*optimizers, outer=2, k=2):
    for _ in range(outer):
        grads = evaluations(optimizers[0], k + 1)
        for optimizer in optimizers:
            phases(optimizer, grads, k)


# What is in a checkpoint


@each_base()
def test_it_is_the_bases_own_and_one_key_more(base):
    optimizer = running(base)
    checkpoint, own = optimizer.state_dict(), optimizer.base_optimizer.state_dict()
    assert checkpoint.keys() == {"state", "param_groups", "lookbehind"}
    assert own.keys() == {"state", "param_groups"}
    assert checkpoint["param_groups"] == own["param_groups"]
    assert checkpoint["state"].keys() == own["state"].keys()
    assert base.id in BARE or own["state"].keys() == {0, 1, 2}
    for i in checkpoint["state"]:
        ours, theirs = checkpoint["state"][i], own["state"][i]
        assert ours.keys() == theirs.keys()
        assert all(
            torch.equal(torch.as_tensor(ours[n]), torch.as_tensor(theirs[n])) for n in ours if ours[n] is not None
        )


@pytest.mark.parametrize(
    ("cls", "settings"),
    [(torsion.Lookbehind, {"k": 3, "alpha": "adaptive"}), (torsion.Lookbehind, {"alpha": 0.25}), (torsion.SAM, {})],
)
def test_the_extra_key_holds_plain_numbers_and_strings(cls, settings):
    extra = build(cls=cls, **settings).state_dict()["lookbehind"]
    assert isinstance(extra, dict)
    assert extra
    assert all(type(value) in (int, float, str, bool) for value in extra.values())
    for name, value in settings.items():
        assert extra[name] == value


@each_base()
def test_the_bases_state_has_the_keys_of_the_bare_base(base):
    optimizer, bare = running(base), base.build([nn.Parameter(torch.randn(s)) for s in SHAPES])
    for p in parameters_of(optimizer):
        assert p in optimizer.base_optimizer.state or base.id in BARE
    for p in bare.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    bare.step()
    for p, q in zip(parameters_of(optimizer), bare.param_groups[0]["params"], strict=True):
        ours, theirs = optimizer.base_optimizer.state.get(p, {}), bare.state.get(q, {})
        kept = {k for k, v in theirs.items() if v is not None}
        assert {k for k, v in ours.items() if v is not None} == kept
        for key in kept:
            assert (ours[key].dtype, ours[key].shape) == (theirs[key].dtype, theirs[key].shape), key


# Going on


@pytest.mark.parametrize("settings", [{}, {"k": 3, "alpha": "adaptive", "asam": True}], ids=["fixed", "adaptive"])
@each_base()
def test_a_resumed_run_goes_on_bit_for_bit(base, settings, compiled_target):
    optimizer = build(base, target=compiled_target, **settings)
    k = settings.get("k", 2)
    go_on(optimizer, k=k)
    other = build(base, like=optimizer, target=compiled_target, **settings)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    go_on(optimizer, other, k=k)
    assert same_bits(everything(optimizer), everything(other))


def test_a_resumed_run_goes_on_bit_for_bit_in_triton(triton_target):
    optimizer = build(target=triton_target)
    go_on(optimizer, outer=1)
    other = build(like=optimizer, target=triton_target)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    go_on(optimizer, other, outer=1)
    assert same_bits(everything(optimizer), everything(other))


@each_base("sgd-momentum", "adam", "tam", "adatamw", "own-sgd")
def test_the_bases_momentum_survives(base):
    """Forgotten momentum is what users of SAM packages lose on resume."""
    optimizer = running(base)
    with_state, without = (build(base, like=optimizer) for _ in range(2))
    with_state.load_state_dict(through_a_file(optimizer.state_dict()))
    go_on(optimizer, with_state, without, outer=1)
    assert same_bits(values_of(with_state), values_of(optimizer))
    assert not same_bits(values_of(without), values_of(optimizer))


@each_base()
def test_the_bare_base_loads_it_and_steps(base):
    optimizer = running(base)
    bare = base.build([nn.Parameter(v) for v in values_of(optimizer)])
    bare.load_state_dict(through_a_file(optimizer.state_dict()))
    inner = optimizer.base_optimizer
    grads = evaluations(optimizer, 1)[0]
    give(optimizer, grads)
    for p, g in zip(bare.param_groups[0]["params"], grads, strict=True):
        p.grad = g.clone()
    inner.step()
    bare.step()
    assert same_bits([p.detach() for p in bare.param_groups[0]["params"]], values_of(optimizer))


@each_base()
def test_a_bare_bases_checkpoint_loads(base):
    """As when training turns from SGD to Lookbehind(SGD); nothing to warn of."""
    bare = base.build([nn.Parameter(torch.randn(s)) for s in SHAPES])
    for _ in range(2):
        for p in bare.param_groups[0]["params"]:
            p.grad = torch.randn_like(p)
        bare.step()
    starts = [p.detach() for p in bare.param_groups[0]["params"]]
    loaded, given = (torsion.Lookbehind(base.build([nn.Parameter(t.clone()) for t in starts])) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded.load_state_dict(through_a_file(bare.state_dict()))
    given.base_optimizer.load_state_dict(through_a_file(bare.state_dict()))
    go_on(loaded, given)
    assert same_bits(everything(loaded), everything(given))


@each_kind
def test_the_groups_are_the_bases_own_after_a_load(base):
    optimizer = running(base)
    checkpoint = optimizer.state_dict()
    checkpoint["param_groups"][0]["lr"] = 0.375
    other = build(base, like=optimizer)
    other.load_state_dict(checkpoint)
    assert other.param_groups is other.base_optimizer.param_groups
    assert other.param_groups[0]["lr"] == 0.375
    other.param_groups[0]["lr"] = 0.0
    start = values_of(other)
    go_on(other, outer=1)
    assert same_bits(values_of(other), start)


def test_sam_and_lookbehind_load_each_other():
    sam = build(cls=torsion.SAM)
    phases(sam, evaluations(sam, 2), 1)
    other = build(like=sam, k=2)
    with pytest.warns(UserWarning, match="k=1"):
        other.load_state_dict(sam.state_dict())
    assert same_bits(everything(other), everything(sam))


# Settings and counters


@pytest.mark.parametrize(
    ("name", "value"),
    [("k", 3), ("rho", 0.3), ("alpha", "adaptive"), ("asam", True), ("alpha_scope", "global")],
)
def test_another_setting_in_the_checkpoint_warns_and_the_constructors_holds(name, value):
    optimizer = running(k=2)
    other, same = (build(like=optimizer, **{name: value}) for _ in range(2))
    with pytest.warns(UserWarning, match=name) as caught:
        other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert str(value) in str(caught[0].message)
    same.base_optimizer.load_state_dict(through_a_file(optimizer.base_optimizer.state_dict()))
    go_on(other, same, k=other.state_dict()["lookbehind"]["k"])
    assert other.state_dict()["lookbehind"][name] == value
    assert same_bits(everything(other), everything(same))


def test_equal_settings_do_not_warn():
    optimizer = running(alpha="adaptive", rho=0.3)
    other = build(like=optimizer, alpha="adaptive", rho=0.3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(through_a_file(optimizer.state_dict()))


def test_counters_are_not_saved():
    optimizer = running()
    phases(optimizer, [[torch.full(s, torch.nan) for s in SHAPES]] * 3, 2)
    assert int(optimizer.skipped_steps()) == 1
    other = build(like=optimizer)
    other.load_state_dict(optimizer.state_dict())
    assert int(other.skipped_steps()) == 0


# In an open outer step


@each_kind
def test_an_open_outer_step_has_no_checkpoint(base):
    optimizer = running(base)
    grads = evaluations(optimizer, 3)
    for done in (1, 2):
        phases(optimizer, grads[:done], 2)
        before = everything(optimizer)
        with pytest.raises(RuntimeError, match="abandon") as caught:
            optimizer.state_dict()
        assert "descent_step" in str(caught.value)
        assert same_bits(everything(optimizer), before)
        optimizer.abandon()
        optimizer.state_dict()


def test_a_step_given_up_for_a_bad_gradient_saves_the_slow_weights():
    optimizer = running()
    start = values_of(optimizer)
    phases(optimizer, [[torch.full(s, torch.nan) for s in SHAPES]] * 3, 2)
    assert same_bits(values_of(optimizer), start)
    other = build(like=optimizer)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    go_on(optimizer, other)
    assert same_bits(everything(optimizer), everything(other))


# What is refused


@pytest.mark.parametrize("spoil", ["groups", "length", "nothing"])
@each_kind
def test_a_checkpoint_that_does_not_fit_is_refused_and_changes_nothing(base, spoil):
    optimizer, twin = running(base), running(base)
    checkpoint = copy.deepcopy(optimizer.state_dict())
    if spoil == "groups":
        checkpoint["param_groups"] *= 2
    elif spoil == "length":
        checkpoint["param_groups"][0]["params"].append(3)
    else:
        checkpoint = {}
    before = everything(optimizer)
    with pytest.raises((ValueError, KeyError, TypeError)):
        optimizer.load_state_dict(checkpoint)
    assert same_bits(everything(optimizer), before)
    assert optimizer.param_groups is optimizer.base_optimizer.param_groups
    go_on(optimizer, twin)
    assert same_bits(everything(optimizer), everything(twin))


@pytest.mark.parametrize("between", [("sgd-momentum", "tam"), ("adamw", "adatamw")], ids=str)
def test_state_crosses_between_torchs_and_torsions_bases(between):
    """As it does between the bare optimizers."""
    for source, goal in (between, between[::-1]):
        optimizer = running(BASE[source])
        other = build(BASE[goal], like=optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            other.load_state_dict(through_a_file(optimizer.state_dict()))
        key = "momentum_buffer" if "sgd" in (source[:3], goal[:3]) else "exp_avg"
        for p, q in zip(parameters_of(optimizer), parameters_of(other), strict=True):
            assert torch.equal(optimizer.base_optimizer.state[p][key], other.base_optimizer.state[q][key])
        go_on(other)
        assert all(v.isfinite().all() for v in everything(other))
