"""Checkpoints: a stop in the middle changes no bit, torch's classes and ours load each other's.

Everything goes through ``torch.save`` and ``torch.load(weights_only=True)``, as a file would.
"""

from __future__ import annotations

import copy

import pytest
import torch
from checkpoints import (
    ADAM,
    ADAMW,
    ADAPTIVE,
    ADATAM,
    ADATAMW,
    CROSSINGS,
    SGD,
    STATES,
    TAM,
    copies,
    gradients,
    parameters,
    resumed,
    through_a_file,
    torch_options,
)
from helpers import DTYPES, LOW, each_class, each_dtype, ids, same_bits, snapshot, take_steps
from tolerances import EXACT, STATE, close
from torch import nn

# Our own


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@each_dtype()
@each_class
def test_a_stop_in_the_middle_changes_no_bit(fast_target, cls, dtype, scope):
    options = {"lr": 0.01, "scope": scope, "weight_decay": 0.1, "max_grad_norm": 1.0}
    optimizer = fast_target.optimizer(cls, [p.to(fast_target.device) for p in parameters(dtype)], **options)
    take_steps(optimizer, gradients(3))
    other = resumed(lambda params: fast_target.optimizer(cls, params), optimizer)
    assert same_bits(snapshot(other), snapshot(optimizer))
    for step in gradients(3, seed=3):
        for o in (optimizer, other):
            take_steps(o, [step])
        assert same_bits(snapshot(other), snapshot(optimizer))
    assert other.cosine().keys() == optimizer.cosine().keys()
    assert same_bits(list(other.cosine().values()), list(optimizer.cosine().values()))


@each_dtype(*LOW)
def test_random_rounding_goes_on_where_it_stopped(fast_target, dtype):
    optimizer = fast_target.optimizer(
        TAM, [p.to(fast_target.device) for p in parameters(dtype)], lr=1e-3, stochastic_rounding=True
    )
    take_steps(optimizer, gradients(3))
    torch.manual_seed(99)  # another seed of its own, were it not for the checkpoint
    other = resumed(lambda params: fast_target.optimizer(TAM, params, stochastic_rounding=True), optimizer)
    assert other.param_groups[0]["sr_seed"] == optimizer.param_groups[0]["sr_seed"] is not None
    for o in (optimizer, other):
        take_steps(o, gradients(4, seed=3))
    assert same_bits(snapshot(other), snapshot(optimizer))


@pytest.mark.parametrize("stop", [0, 1, 2])
def test_clone_resumes_before_and_after_it_seeded(stop):
    optimizer = TAM(parameters(), lr=0.1, init="clone", scope="group")
    take_steps(optimizer, gradients(stop))
    other = resumed(TAM, optimizer)
    for o in (optimizer, other):
        take_steps(o, gradients(2, seed=3))
    assert same_bits(snapshot(other), snapshot(optimizer))


@each_dtype()
@each_class
def test_state_keeps_its_own_dtype(cls, dtype):
    """torch casts loaded state to the parameter's dtype; bfloat16 would then lose what float32 state is for."""
    optimizer = cls(parameters(dtype), lr=0.01)
    take_steps(optimizer, gradients(2))
    other = resumed(cls, optimizer)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for state in other.state.values():
        assert all(state[k].dtype == wide for k in STATES[cls])
    take_steps(other, gradients(1))
    for state in other.state.values():
        assert state["correlation"].dtype == wide
        assert state["step"].dtype == torch.float32


def test_state_takes_the_layout_of_its_parameter():
    p = nn.Parameter(torch.randn(2, 3, 4, 5))
    optimizer = TAM([p], lr=0.1)
    p.grad = torch.randn_like(p)
    optimizer.step()
    other = TAM([nn.Parameter(p.detach().contiguous(memory_format=torch.channels_last))])
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    (q,) = other.param_groups[0]["params"]
    assert other.state[q]["momentum_buffer"].is_contiguous(memory_format=torch.channels_last)
    p.grad = torch.randn_like(p)
    q.grad = p.grad.contiguous(memory_format=torch.channels_last)
    for o in (optimizer, other):
        o.step()
    close(q, p.detach(), STATE[torch.float32])


def test_late_parameters():
    """Some have no state yet when the run stops; they join after it, and adopt the scope's cosine as without a stop."""
    optimizer = TAM(parameters(), lr=0.1)
    take_steps(optimizer, [[g[0], None, g[2]] for g in gradients(3)])
    other = resumed(TAM, optimizer)
    for o in (optimizer, other):
        take_steps(o, gradients(2, seed=3))
    assert same_bits(snapshot(other), snapshot(optimizer))


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_a_group_added_on_the_way(scope):
    params = parameters()
    optimizer = TAM(params[:2], lr=0.1, scope=scope)
    take_steps(optimizer, [g[:2] for g in gradients(2)])
    optimizer.add_param_group({"params": params[2:], "lr": 0.5, "momentum": 0.5})
    take_steps(optimizer, gradients(1))
    again = copies(optimizer)
    other = TAM([{"params": again[:2]}, {"params": again[2:]}])
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert [g["lr"] for g in other.param_groups] == [0.1, 0.5]
    for o in (optimizer, other):
        take_steps(o, gradients(2, seed=3))
    assert same_bits(snapshot(other), snapshot(optimizer))


def test_options_of_the_checkpoint_win_over_the_constructors():
    optimizer = TAM(parameters(), lr=0.3, decay=0.5, eps_damping=0.1, scope="tensor", max_grad_norm=2.0, maximize=True)
    other = TAM(parameters(), lr=0.1)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    for key, value in optimizer.param_groups[0].items():
        assert key == "params" or other.param_groups[0][key] == value


def test_a_rate_in_a_tensor():
    rate = torch.tensor(0.05)
    optimizer = TAM(parameters(), lr=rate)
    take_steps(optimizer, gradients(1))
    other = TAM(copies(optimizer))
    other.load_state_dict(optimizer.state_dict())
    assert other.param_groups[0]["lr"] is not rate
    for o in (optimizer, other):
        take_steps(o, gradients(1))
    assert same_bits(snapshot(other), snapshot(optimizer))
    rate.fill_(1.0)
    assert float(other.param_groups[0]["lr"]) == pytest.approx(0.05)


def test_names_of_parameters():
    model = nn.Linear(3, 2)
    optimizer = TAM(model.named_parameters())
    other = TAM(nn.Linear(3, 2).parameters())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    assert other.param_groups[0]["param_names"] == ["weight", "bias"]
    named = TAM(model.named_parameters())
    named.load_state_dict(TAM(nn.Linear(3, 2).parameters()).state_dict())
    assert named.param_groups[0]["param_names"] == ["weight", "bias"]


# Nothing is shared


@each_class
def test_scalars_of_a_checkpoint_are_tensors_of_their_own(cls):
    """torch's optimizers count a ``step`` in place; one that parameters shared would count once for each of them."""
    optimizer = cls(parameters(), lr=0.01)
    take_steps(optimizer, gradients(2))
    before = snapshot(optimizer)
    checkpoint = optimizer.state_dict()
    scalars = [s[k] for s in checkpoint["state"].values() for k in ("step", "correlation")]
    assert len({t.untyped_storage().data_ptr() for t in scalars}) == len(scalars)
    for t in scalars:
        assert t.untyped_storage().nbytes() == t.element_size(), "a view would save every other scalar with it"
        t.fill_(77)
    assert same_bits(snapshot(optimizer), before)


@each_class
def test_a_loaded_checkpoint_stays_the_users(cls):
    optimizer = cls(parameters(), lr=0.01)
    take_steps(optimizer, gradients(2))
    checkpoint = copy.deepcopy(optimizer.state_dict())
    kept = copy.deepcopy(checkpoint)
    other = cls(copies(optimizer))
    other.load_state_dict(checkpoint)
    take_steps(other, gradients(2, seed=3))
    for key, state in kept["state"].items():
        for name, value in state.items():
            assert torch.equal(checkpoint["state"][key][name], value)
    assert checkpoint["param_groups"] == kept["param_groups"]
    fresh = cls(copies(optimizer))
    fresh.load_state_dict(checkpoint)
    for state in checkpoint["state"].values():
        for value in state.values():
            value.fill_(77)
    for state in fresh.state.values():
        assert not any((value == 77).any() for value in state.values())


def test_scalars_that_come_back_as_one_tensor():
    """As from distributed checkpoints."""
    optimizer = ADATAM(parameters(), lr=0.01, bias_correction=True)
    take_steps(optimizer, gradients(2))
    checkpoint = optimizer.state_dict()
    step, correlation = checkpoint["state"][0]["step"], checkpoint["state"][0]["correlation"]
    for state in checkpoint["state"].values():
        state.update(step=step, correlation=correlation)
    other = ADATAM(copies(optimizer))
    other.load_state_dict(checkpoint)
    for o in (optimizer, other):
        take_steps(o, gradients(2, seed=3))
    assert same_bits(snapshot(other), snapshot(optimizer))
    assert float(step) == 2


# torch's classes


@pytest.mark.parametrize(("theirs", "ours"), CROSSINGS, ids=ids)
@each_dtype(torch.float32, torch.bfloat16)
def test_from_torch_to_ours(theirs, ours, dtype):
    source = theirs(parameters(dtype), **torch_options(theirs))
    take_steps(source, gradients(3))
    optimizer = resumed(ours, source, lr=0.5, decay=0.25, eps_damping=0.125, scope="tensor", max_grad_norm=3.0)
    group = optimizer.param_groups[0]
    assert group.items() >= torch_options(theirs).items(), "what torch's class has comes from the checkpoint"
    assert (group["decay"], group["eps_damping"], group["scope"], group["max_grad_norm"]) == (
        0.25,
        0.125,
        "tensor",
        3.0,
    )
    assert group["decoupled_weight_decay"] == (ours is ADATAMW), "the kind of decay is the class's own"
    for p, q in zip(source.param_groups[0]["params"], group["params"], strict=True):
        state, saved = optimizer.state[q], source.state[p]
        for key in STATES[ours]:
            close(state[key], saved[key].double(), EXACT)
            assert state[key].dtype == torch.float32
        assert float(state["correlation"]) == 0
        assert float(state["step"]) == (3 if "step" in saved else 1)
    take_steps(optimizer, gradients(1))
    assert set(optimizer.cosine()) == {"0.0", "0.1", "0.2"}
    assert any(float(s) != 0 for s in optimizer.cosine().values()), "the momentum that came along has a direction"


@pytest.mark.parametrize(("theirs", "ours"), CROSSINGS, ids=ids)
def test_from_ours_to_torch_and_on(theirs, ours):
    """torch's class steps on from our state as from its own, and its groups lack nothing."""
    optimizer = ours(parameters(), **torch_options(theirs))
    take_steps(optimizer, gradients(3))
    target = resumed(theirs, optimizer)
    by_hand = theirs(copies(optimizer), **torch_options(theirs))
    if theirs is ADAM and ours is ADATAMW:
        by_hand.param_groups[0]["decoupled_weight_decay"] = True  # Adam takes that from AdamW's checkpoints too
    for p, q in zip(optimizer.param_groups[0]["params"], by_hand.param_groups[0]["params"], strict=True):
        by_hand.state[q] = {k: optimizer.state[p][k].clone() for k in ("step", *STATES[ours])}
    for o in (target, by_hand):
        take_steps(o, gradients(3, seed=3))
    for p, q in zip(target.param_groups[0]["params"], by_hand.param_groups[0]["params"], strict=True):
        assert torch.equal(p, q)
        for key in STATES[ours]:
            assert torch.equal(target.state[p][key], by_hand.state[q][key])
        if theirs is not SGD:
            assert float(target.state[p]["step"]) == 6, "once per step, not once per parameter"
    assert target.param_groups[0].keys() >= theirs(parameters()).param_groups[0].keys()


@pytest.mark.parametrize("foreach", [True, False], ids=["foreach", "single"])
@pytest.mark.parametrize(("theirs", "ours"), CROSSINGS, ids=ids)
def test_there_and_back(theirs, ours, foreach):
    """From torch to ours to torch to ours, steps everywhere."""
    first = theirs(parameters(), **torch_options(theirs), foreach=foreach)
    take_steps(first, gradients(2))
    second = resumed(ours, first)
    take_steps(second, gradients(2))
    third = resumed(theirs, second)
    assert third.param_groups[0]["foreach"] is foreach
    take_steps(third, gradients(2))
    fourth = resumed(ours, third)
    take_steps(fourth, gradients(2))
    if theirs is not SGD:
        assert all(float(s["step"]) == 8 for s in fourth.state.values())
    assert all(p.isfinite().all() for p in fourth.param_groups[0]["params"])


@pytest.mark.parametrize("source", ADAPTIVE, ids=ids)
@pytest.mark.parametrize("target", ADAPTIVE, ids=ids)
def test_the_adaptive_family_in_every_direction(source, target):
    before = source(parameters(), **torch_options(source))
    take_steps(before, gradients(2))
    after = resumed(target, before)
    for p, q in zip(before.param_groups[0]["params"], after.param_groups[0]["params"], strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(before.state[p][key], after.state[q][key]), "as it stands: an average there, a sum here"
    take_steps(after, gradients(2))
    assert all(float(s["step"]) == 4 for s in after.state.values())


def test_bfloat16_through_torch_comes_back_with_float32_state():
    """torch's class casts state to bfloat16; coming back it is float32 again, as good as torch left it."""
    optimizer = ADATAMW(parameters(torch.bfloat16))
    take_steps(optimizer, gradients(2))
    there = resumed(ADAMW, optimizer)
    assert all(s["exp_avg"].dtype == torch.bfloat16 for s in there.state.values())
    take_steps(there, gradients(1))
    back = resumed(ADATAMW, there)
    take_steps(back, gradients(1))
    assert all(s["exp_avg"].dtype == s["correlation"].dtype == torch.float32 for s in back.state.values())


def test_maximize_comes_from_torchs_checkpoint():
    source = SGD(parameters(), lr=0.1, momentum=0.9, maximize=True)
    assert resumed(TAM, source).param_groups[0]["maximize"] is True


# SGD keeps less than TAM needs


def test_no_correlation_is_zero():
    optimizer = TAM(parameters(), lr=0.1)
    take_steps(optimizer, gradients(3))
    checkpoint = optimizer.state_dict()
    for state in checkpoint["state"].values():
        del state["correlation"]
    other = TAM(copies(optimizer))
    other.load_state_dict(checkpoint)
    assert all(float(s["correlation"]) == 0 for s in other.state.values())
    take_steps(other, gradients(1))
    # s^_1 = (1 - decay) s_1
    close(other.damping()["global"], 0.5 + 0.05 * float(other.cosine()["global"]), STATE[torch.float32])


def test_no_step_does_not_seed_again():
    source = SGD(parameters(), lr=0.1, momentum=0.9)
    take_steps(source, gradients(2))
    assert all("step" not in s for s in source.state.values())
    optimizer = resumed(TAM, source, init="clone")
    step = gradients(1, seed=3)
    take_steps(optimizer, step)
    damping = 1e-8 + float(optimizer.damping()["global"])
    for p, q, g in zip(optimizer.param_groups[0]["params"], source.param_groups[0]["params"], step[0], strict=True):
        expected = 0.9 * source.state[q]["momentum_buffer"].double() + damping * g.double()
        close(optimizer.state[p]["momentum_buffer"], expected, STATE[torch.float32])


@pytest.mark.parametrize("steps", [0, 2])
def test_sgd_without_momentum_so_far(steps):
    """Its checkpoint holds no buffers (or ``None``): the run starts as a new one does, clones included."""
    source = SGD(parameters(), lr=0.1, momentum=0.0)
    take_steps(source, gradients(steps))
    optimizer = resumed(TAM, source, init="clone")
    assert optimizer.param_groups[0]["momentum"] == 0
    step = gradients(1, seed=3)
    take_steps(optimizer, step)
    for p, g in zip(optimizer.param_groups[0]["params"], step[0], strict=True):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], g)
        assert float(optimizer.state[p]["step"]) == 1


def test_an_empty_buffer_as_older_torch_saved_it():
    source = SGD(parameters(), lr=0.1, momentum=0.9)
    checkpoint = source.state_dict()
    checkpoint["state"] = {i: {"momentum_buffer": None} for i in range(3)}
    optimizer = TAM(parameters())
    optimizer.load_state_dict(checkpoint)
    take_steps(optimizer, gradients(1))
    assert all(float(s["step"]) == 1 for s in optimizer.state.values())


# Hooks


def test_hooks_see_and_change_what_passes():
    optimizer = TAM(parameters(), lr=0.1)
    take_steps(optimizer, gradients(2))
    seen = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("save-pre"))
    optimizer.register_state_dict_post_hook(lambda o, c: {**c, "note": "kept"})
    checkpoint = optimizer.state_dict()
    assert checkpoint["note"] == "kept"
    other = TAM(copies(optimizer))

    def rename(o, c):
        seen.append("load-pre")
        for group in c["param_groups"]:
            group["lr"] = 0.25

    def drop(o, c):
        return {k: v for k, v in c.items() if k != "note"}

    other.register_load_state_dict_pre_hook(rename)
    other.register_load_state_dict_pre_hook(drop)
    other.register_load_state_dict_post_hook(lambda o: seen.append(("load-post", o.param_groups[0]["lr"])))
    other.load_state_dict(copy.deepcopy(checkpoint))
    assert seen == ["save-pre", "load-pre", ("load-post", 0.25)]


def test_a_post_hook_may_return_something_else_altogether():
    optimizer = TAM(parameters())
    take_steps(optimizer, gradients(1))
    optimizer.register_state_dict_post_hook(lambda o, c: {"flat": [c]})
    assert list(optimizer.state_dict()) == ["flat"]


def test_hooks_run_in_a_refused_load_only_before_it():
    optimizer = TAM(parameters())
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda o, c: seen.append("pre"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("post"))
    with pytest.raises(ValueError, match="0 parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert seen == ["pre"]


# Schedulers and extra keys


def test_a_scheduler_resumes_with_its_optimizer():
    def start(params):
        optimizer = TAM(params, lr=1.0)
        return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)

    optimizer, scheduler = start(parameters())
    for step in gradients(3):
        take_steps(optimizer, [step])
        scheduler.step()
    other, again = start(copies(optimizer))
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    again.load_state_dict(through_a_file(scheduler.state_dict()))
    assert other.param_groups[0]["initial_lr"] == 1.0
    for step in gradients(3, seed=3):
        for o, s in ((optimizer, scheduler), (other, again)):
            take_steps(o, [step])
            s.step()
    assert same_bits(snapshot(other), snapshot(optimizer))


def test_keys_of_others_pass_through():
    optimizer = TAM(parameters(), lr=0.1)
    take_steps(optimizer, gradients(1))
    checkpoint = optimizer.state_dict()
    checkpoint["state"][0]["mine"] = torch.ones(2)
    checkpoint["param_groups"][0]["role"] = "backbone"
    other = TAM(copies(optimizer))
    other.load_state_dict(through_a_file(checkpoint))
    take_steps(other, gradients(1))
    assert torch.equal(other.state_dict()["state"][0]["mine"], torch.ones(2))
    assert other.param_groups[0]["role"] == "backbone"


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
def test_a_checkpoint_holds_what_it_needs_and_no_more(dtype):
    """Bytes of the state: the tensors and two scalars each, not the shared memory they are views of."""
    optimizer = TAM([nn.Parameter(torch.ones(2, dtype=dtype)) for _ in range(200)])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = [t.untyped_storage().nbytes() for s in optimizer.state_dict()["state"].values() for t in s.values()]
    assert sum(held) <= 200 * (2 * 8 + 4 + 8)
