"""Lookbehind and SAM as torch optimizers: names, groups shared with the base, the path taken, hooks, schedulers."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from cycles import (
    BASE,
    MOMENTUM,
    OwnSGD,
    Run,
    each_base,
    each_kind,
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
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode

import torsion
from torsion.ops import _native
from torsion.ops._cycle import CLOSING, RULES

KEYWORDS = {
    "k": 2,
    "rho": 0.05,
    "alpha": 0.5,
    "asam": False,
    "eta": 0.01,
    "alpha_scope": "tensor",
    "reuse_gradients": True,
    "backend": None,
}


def build(base=MOMENTUM, cls=torsion.Lookbehind, **settings):
    torch.manual_seed(1)
    return cls(base.build([nn.Parameter(torch.randn(s)) for s in [(4, 3), (5,), ()]]), **settings)


# Names


@pytest.mark.parametrize(
    ("cls", "names"), [(torsion.Lookbehind, list(KEYWORDS)), (torsion.SAM, ["rho", "asam", "eta", "backend"])]
)
def test_signatures_are_those_of_the_interface(cls, names):
    given = inspect.signature(cls).parameters
    assert next(iter(given)) == "base_optimizer"
    taken = {n: p for n, p in given.items() if p.kind is p.KEYWORD_ONLY}
    assert {n: p.default for n, p in taken.items()} == {n: KEYWORDS[n] for n in names}
    assert getattr(torsion.optim, cls.__name__) is cls
    with pytest.raises(TypeError):
        cls(MOMENTUM.build([nn.Parameter(torch.ones(1))]), 2)


@pytest.mark.parametrize("cls", [torsion.Lookbehind, torsion.SAM])
@each_kind
def test_it_is_an_optimizer_over_the_bases_own_groups(base, cls):
    optimizer = build(base, cls)
    inner = optimizer.base_optimizer
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert type(inner) is base.cls
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.defaults == inner.defaults
    assert optimizer.state == inner.state
    inner.param_groups[0]["lr"] = 0.25
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert issubclass(torsion.SAM, torsion.Lookbehind)


@each_kind
def test_a_group_added_to_either_is_in_both(base):
    """And takes part in the next outer step, with its own rate."""
    for hold in ("itself", "base"):
        optimizer = build(base)
        phases(optimizer, evaluations(optimizer, 3), 2)
        late = nn.Parameter(torch.ones(6))
        (optimizer if hold == "itself" else optimizer.base_optimizer).add_param_group({"params": [late], "lr": 0.0})
        assert optimizer.param_groups is optimizer.base_optimizer.param_groups
        before = values_of(optimizer)
        phases(optimizer, evaluations(optimizer, 3), 2)
        assert torch.equal(late, torch.ones(6))
        assert not same_bits(values_of(optimizer)[:3], before[:3])
        optimizer.param_groups[1]["lr"] = 0.1
        phases(optimizer, evaluations(optimizer, 3), 2)
        assert not torch.equal(late, torch.ones(6))


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none):
    optimizer = build()
    give(optimizer, evaluations(optimizer, 1)[0])
    optimizer.zero_grad(set_to_none=set_to_none)
    for p in parameters_of(optimizer):
        assert p.grad is None if set_to_none else not p.grad.any()


# Which path


@each_base()
def test_the_path_taken(base):
    """Fused for torch's and torsion's own classes, exactly; the general path for everything else."""
    optimizer = build(base)
    assert optimizer.fused is base.fused
    text = repr(optimizer)
    assert base.cls.__name__ in text
    assert "fused" in text
    assert str(base.fused) in text


class _Calls(TorchDispatchMode):
    """Passes of a cycle that reach the dispatcher, by name; ``sums`` are passes that only add up."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.torsion.lookbehind_closing_planned_.default:
            self.made.append(list(CLOSING)[args[1]] + " and blend")
        if func is torch.ops.torsion.lookbehind_planned_.default:
            name = next(name for name, rule in RULES.items() if rule["number"] == args[1])
            self.made.append(name + {0: "", 1: " sums", 2: " rest"}[args[11]])
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(_native.plan is None, reason="the compiled modules are not built")
@pytest.mark.parametrize("alpha", [0.5, "adaptive"])
def test_the_general_path_ascends_and_interpolates_in_fused_passes(alpha):
    optimizer = build(BASE["own-sgd"], k=2, alpha=alpha, asam=True)
    grads = evaluations(optimizer, 3)
    with _Calls() as calls:
        phases(optimizer, grads, 2)
    assert calls.made == [
        "opening_ascent/asam", "ascent/asam sums", "ascent/asam rest", "ascent sums",
        "blend" if alpha == 0.5 else "blend/adaptive",
    ]  # fmt: skip


@pytest.mark.skipif(_native.plan is None, reason="the compiled modules are not built")
@each_base("sgd", "sgd-momentum", "adamw", "tam", "adatamw")
def test_an_adaptive_step_closes_in_one_call(base):
    """Its last descent sums for the interpolation, which need not read the weights for that again."""
    optimizer = build(base, k=2, alpha="adaptive")
    grads = evaluations(optimizer, 3)
    with _Calls() as calls:
        phases(optimizer, grads, 2)
    rule = {"sgd-momentum": "sgd_momentum", "adamw": "adam", "adatamw": "adatam"}.get(base.id, base.id)
    assert calls.made == ["opening_ascent", f"descent_ascent/{rule}", f"last_descent/{rule} and blend"]


@pytest.mark.parametrize(
    ("base", "reason"),
    [("own-sgd", "OwnSGD"), ("rmsprop", "RMSprop"), ("adamw-amsgrad", "amsgrad")],
)
def test_the_repr_says_why_it_is_not_fused(base, reason):
    text = repr(build(BASE[base])).replace("base_optimizer: ", "base_optimizer: \0").split("\0")[0]
    assert reason in text, "in what is said of the path, not only in the base's own repr"


def test_the_repr_names_the_settings():
    text = repr(build(k=7, rho=0.25, alpha="adaptive"))
    for word in ("k=7", "rho=0.25", "alpha='adaptive'", "Lookbehind"):
        assert word in text
    assert "SAM" in repr(build(cls=torsion.SAM))


def test_the_back_end_named_runs(monkeypatch):
    """``backend=`` before TORSION_BACKEND before the best."""
    monkeypatch.setenv("TORSION_BACKEND", "reference")
    assert "reference" in repr(build())
    assert "backend=cpu" in repr(build(backend="cpu")).replace("'", "")


# Hooks


@pytest.mark.parametrize("explicit", [False, True], ids=["closure", "phases"])
@each_kind
def test_step_hooks_run_once_per_outer_step(base, explicit, fast_target):
    """Before the first ascent and after the interpolation: both see slow weights."""
    run = Run(fast_target, base, {"k": 3})
    seen = []

    def note(when):
        def hook(optimizer, args, kwargs):
            seen.append((when, optimizer, run.values()))

        return hook

    handles = [
        run.optimizer.register_step_pre_hook(note("pre")),
        run.optimizer.register_step_post_hook(note("post")),
    ]
    for step in range(2):
        before = run.values()
        (run.by_phases if explicit else run.step)(step)
        assert [s[0] for s in seen] == ["pre", "post"]
        assert all(s[1] is run.optimizer for s in seen)
        assert same_bits(seen[0][2], before)
        assert same_bits(seen[1][2], run.values())
        seen.clear()
    for handle in handles:
        handle.remove()
    (run.by_phases if explicit else run.step)(2)
    assert not seen


@pytest.mark.parametrize("explicit", [False, True], ids=["closure", "phases"])
@each_kind
def test_the_bases_hooks_run_on_the_general_path_alone(base, explicit, fast_target):
    run = Run(fast_target, base, {"k": 3})
    seen = []
    run.optimizer.base_optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    run.optimizer.base_optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    (run.by_phases if explicit else run.step)(0)
    assert seen == ([] if base.fused else ["pre", "post"] * 3)


def test_a_base_that_changes_gradients_in_its_step_does_not_change_the_ascent(fast_target):
    """The gradient shared by a descent and the next ascent is the raw one."""

    class Halving(OwnSGD):
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.grad.mul_(0.5)
                p.grad[0].neg_()
            return super().step(closure)

    runs = []
    for reuse in (True, False):
        run = Run(fast_target, MOMENTUM, {"k": 3, "reuse_gradients": reuse})
        base = Halving(run.model.parameters(), lr=0.1)
        run.optimizer = fast_target.optimizer(torsion.Lookbehind, base, **run.settings)
        for step in range(3):
            run.step(step)
        runs.append(run)
    assert same_bits(runs[0].everything(), runs[1].everything())


# Schedulers

SCHEDULES = {
    "step": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, max_lr=0.05, total_steps=8),
    "chained": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, gamma=0.5)], milestones=[2]
    ),
}


@pytest.mark.parametrize("explicit", [False, True], ids=["closure", "phases"])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
@each_base("sgd-momentum", "adamw", "own-sgd")
def test_a_scheduler_may_hold_either(base, schedule, explicit, fast_target):
    """The same rates and momenta, the same weights as by hand, and no warning about the order of calls."""
    theirs = base.build([nn.Parameter(torch.ones(2))])
    by_hand = Run(fast_target, base, {"k": 2})
    held = {hold: Run(fast_target, base, {"k": 2}) for hold in ("itself", "base")}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="To get the last learning rate")
        warnings.filterwarnings("ignore", message="The epoch parameter")
        schedulers = [
            schedule(run.optimizer if hold == "itself" else run.optimizer.base_optimizer) for hold, run in held.items()
        ]
        model = schedule(theirs)
        for step in range(5):
            for key in ("lr", "momentum", "betas"):
                if key in theirs.param_groups[0]:
                    by_hand.optimizer.param_groups[0][key] = theirs.param_groups[0][key]
            for run in (*held.values(), by_hand):
                for key in ("lr", "momentum", "betas"):
                    assert run.optimizer.param_groups[0].get(key) == theirs.param_groups[0].get(key)
                (run.by_phases if explicit else run.step)(step)
            theirs.step()
            for scheduler in (*schedulers, model):
                scheduler.step()
            for run in held.values():
                assert same_bits(run.everything(), by_hand.everything())


def test_plateau_schedule():
    optimizer = build()
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    start = optimizer.param_groups[0]["lr"]
    for loss in (1.0, 1.0):
        phases(optimizer, evaluations(optimizer, 3), 2)
        scheduler.step(loss)
    assert optimizer.base_optimizer.param_groups[0]["lr"] == pytest.approx(start / 10)


def test_a_scheduler_called_first_is_still_warned_of():
    run = Run(_Plain(), MOMENTUM, {"k": 2})
    scheduler = lr_scheduler.StepLR(run.optimizer, 1)
    with pytest.warns(UserWarning, match="lr_scheduler.step"):
        scheduler.step()


class _Plain:
    """No back end asked for."""

    device = "cpu"

    def optimizer(self, cls, params, **keywords):
        return cls(params, **keywords)


@each_kind
def test_without_a_back_end_named_the_best_runs(base):
    named, best = build(base, backend="cpu"), build(base)
    for _ in range(2):
        grads = evaluations(named, 3)
        for optimizer in (named, best):
            phases(optimizer, grads, 2)
    assert same_bits(everything(named), everything(best))


# Copies and other users of the interface


@each_kind
def test_a_deep_copy_goes_on_alike(base):
    optimizer = build(base, k=2, alpha="adaptive")
    phases(optimizer, evaluations(optimizer, 3), 2)
    other = copy.deepcopy(optimizer)
    assert other.param_groups is other.base_optimizer.param_groups
    assert other.param_groups is not optimizer.param_groups
    grads = evaluations(optimizer, 3)
    for o in (optimizer, other):
        phases(o, grads, 2)
    assert same_bits(everything(optimizer), everything(other))


def test_two_optimizers_of_one_model_do_not_meet(fast_target):
    """Each perturbs its own half while the other waits at its slow weights."""
    torch.manual_seed(1)
    halves = [nn.Linear(3, 3), nn.Linear(3, 3)]
    optimizers = [torsion.Lookbehind(MOMENTUM.build(m.parameters()), k=2) for m in halves]
    for first, second in ((0, 1), (1, 0)):
        others = values_of(optimizers[second])
        grads = evaluations(optimizers[first], 3)
        for phase, each in zip(order_of(2), grads, strict=True):
            give(optimizers[first], each)
            getattr(optimizers[first], phase)()
            assert same_bits(values_of(optimizers[second]), others)


@each_base("sgd-momentum", "adamw", "tam", "own-sgd")
def test_every_kind_trains(base, compiled_target):
    for settings in ({"k": 2}, {"k": 3, "alpha": 0.8, "asam": True, "rho": 0.1}):
        run = Run(compiled_target, base, settings)
        first = float(run.step(0).detach())
        for _ in range(50):
            last = run.step(0)
        assert float(last.detach()) < 0.5 * first
