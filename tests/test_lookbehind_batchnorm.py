"""BatchNorm statistics under ``bn_first_pass_only``: once per outer step, at the slow weights, and nothing else."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from cycles import MOMENTUM, each_base, each_reuse, everything, order_of, values_of
from helpers import same_bits
from torch import nn

import torsion
from torsion.optim import bn_first_pass_only

K = 3


def network(momentum=0.1, kind=nn.BatchNorm1d):
    torch.manual_seed(1)
    norm = kind(5, momentum=momentum)
    return nn.Sequential(nn.Linear(6, 5), norm, nn.Tanh(), nn.Linear(5, 2))


def lookbehind(model, base=MOMENTUM, cls=torsion.Lookbehind, **settings):
    settings = {"k": K, **settings} if cls is torsion.Lookbehind else settings
    return cls(base.build(model.parameters()), **settings)


def batch(step):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randn(8, 6, generator=generator)


def closure_for(model, optimizer, step):
    def closure():
        optimizer.zero_grad()
        loss = model(batch(step)).square().mean()
        loss.backward()
        return loss

    return closure


def statistics(model):
    return [b.detach().clone() for m in model.modules() for b in m.buffers(recurse=False)]


def seen(model):
    return int(model[1].num_batches_tracked)


def after_one_pass(model, step=0):
    """The statistics that one pass over the batch leaves, in a copy."""
    other = copy.deepcopy(model)
    other.train()
    other(batch(step))
    return statistics(other)


def test_the_helper_is_where_it_is_documented():
    assert torsion.optim.bn_first_pass_only is bn_first_pass_only


@each_reuse
def test_without_it_every_evaluation_counts(reuse):
    model = network()
    optimizer = lookbehind(model, reuse_gradients=reuse)
    optimizer.step(closure_for(model, optimizer, 0))
    assert seen(model) == len(order_of(K, reuse))


@pytest.mark.parametrize("momentum", [0.1, None], ids=["running", "cumulative"])
@each_reuse
@each_base("sgd-momentum", "own-sgd")
def test_one_outer_step_leaves_the_statistics_of_its_first_pass(base, reuse, momentum):
    model = network(momentum)
    optimizer = lookbehind(model, base, reuse_gradients=reuse)
    for step in range(3):
        expected = after_one_pass(model, step)
        with bn_first_pass_only(model):
            optimizer.step(closure_for(model, optimizer, step))
        assert same_bits(statistics(model), expected)
        assert seen(model) == step + 1


def test_around_a_whole_loop():
    model = network()
    optimizer = lookbehind(model)
    with bn_first_pass_only(model):
        for step in range(3):
            expected = after_one_pass(model, step)
            optimizer.step(closure_for(model, optimizer, step))
            assert same_bits(statistics(model), expected)
    model(batch(0))
    assert seen(model) == 4, "back to normal"


def test_sam():
    model = network()
    optimizer = lookbehind(model, cls=torsion.SAM)
    with bn_first_pass_only(model):
        for step in range(2):
            expected = after_one_pass(model, step)
            optimizer.step(closure_for(model, optimizer, step))
            assert same_bits(statistics(model), expected)


@each_reuse
def test_explicit_phases_and_all_micro_batches_of_the_first_evaluation(reuse):
    model, plain = network(), network()
    optimizer = lookbehind(model, reuse_gradients=reuse)
    for outer in range(2):
        plain.load_state_dict(model.state_dict())
        for micro in range(2):
            plain(batch(micro))
        with bn_first_pass_only(model):
            for phase in order_of(K, reuse):
                optimizer.zero_grad()
                for micro in range(2):
                    (model(batch(micro)).square().mean() / 2).backward()
                getattr(optimizer, phase)()
        assert same_bits(statistics(model), statistics(plain))
        assert seen(model) == 2 * (outer + 1)


@each_reuse
def test_the_weights_take_the_same_way(reuse):
    """In training mode the statistics are not read, so only they differ."""
    models = [network(), network()]
    optimizers = [lookbehind(m, reuse_gradients=reuse) for m in models]
    for step in range(3):
        with bn_first_pass_only(models[0]):
            a = optimizers[0].step(closure_for(models[0], optimizers[0], step))
        b = optimizers[1].step(closure_for(models[1], optimizers[1], step))
        assert torch.equal(a, b)
    assert same_bits(everything(optimizers[0]), everything(optimizers[1]))
    assert not same_bits(statistics(models[0]), statistics(models[1]))


def _settings(model):
    return [
        (m.training, getattr(m, "momentum", None), getattr(m, "track_running_stats", None)) for m in model.modules()
    ]


@pytest.mark.parametrize("how", ["end", "exception", "abandon", "middle"])
def test_everything_is_as_it_was_afterwards(how):
    model = network(momentum=0.25)
    optimizer = lookbehind(model)
    before = _settings(model)
    forwards = [m.forward for m in model.modules()]

    def use():
        with bn_first_pass_only(model):
            closure_for(model, optimizer, 0)()
            optimizer.ascent_step()
            if how == "exception":
                raise KeyError("in the loop")
            if how == "abandon":
                optimizer.abandon()

    if how == "exception":
        with pytest.raises(KeyError):
            use()
    elif how == "end":
        with bn_first_pass_only(model):
            optimizer.step(closure_for(model, optimizer, 0))
    else:
        use()
    assert _settings(model) == before
    assert [m.forward for m in model.modules()] == forwards
    count = seen(model)
    model(batch(1))
    assert seen(model) == count + 1


def test_after_a_step_given_up_the_next_first_pass_counts_again():
    """For a bad gradient, for an exception and by hand."""
    model = network()
    optimizer = lookbehind(model)
    with bn_first_pass_only(model):
        calls = itertools.count()

        def nan_at_the_second():
            loss = closure_for(model, optimizer, 0)()
            if next(calls) == 1:
                model[0].weight.grad[0, 0] = torch.nan
            return loss

        optimizer.step(nan_at_the_second)
        assert seen(model) == 1
        assert int(optimizer.skipped_steps()) == 1
        optimizer.step(closure_for(model, optimizer, 1))
        assert seen(model) == 2

        def raise_at_the_second():
            if seen(model) == 3:
                raise KeyError("no batch left")
            return closure_for(model, optimizer, 2)()

        with pytest.raises(KeyError):
            optimizer.step(raise_at_the_second)
        optimizer.step(closure_for(model, optimizer, 3))
        assert seen(model) == 4


def test_only_optimizers_that_hold_the_models_parameters_matter():
    """A plain optimizer, and Lookbehind on another model in the middle of its outer step."""
    model, other = network(), network()
    plain = torch.optim.SGD(model.parameters(), lr=0.1)
    theirs = lookbehind(other)
    closure_for(other, theirs, 0)()
    with bn_first_pass_only(model):
        theirs.ascent_step()
        for step in range(3):
            closure_for(model, plain, step)()
            plain.step()
        theirs.abandon()
    assert seen(model) == 3


def test_an_optimizer_of_some_of_the_parameters_is_enough():
    """The statistics of all layers would come from perturbed weights."""
    model = network()
    optimizer = torsion.Lookbehind(MOMENTUM.build(model[0].parameters()), k=K)
    with bn_first_pass_only(model):
        optimizer.step(closure_for(model, optimizer, 0))
    assert seen(model) == 1


def test_two_optimizers_of_one_model():
    """Generator and discriminator style: each outer step counts its own first pass."""
    model = network()
    first = torsion.Lookbehind(MOMENTUM.build(model[0].parameters()), k=K)
    second = torsion.SAM(MOMENTUM.build(model[3].parameters()))
    with bn_first_pass_only(model):
        for optimizer in (first, second, first):
            optimizer.step(closure_for(model, optimizer, 0))
    assert seen(model) == 3


def test_a_forward_between_outer_steps_counts_as_usual():
    model = network()
    optimizer = lookbehind(model)
    with bn_first_pass_only(model):
        optimizer.step(closure_for(model, optimizer, 0))
        model(batch(1))
    assert seen(model) == 2


def test_eval_mode_and_layers_without_statistics_are_left_alone():
    model = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 5))
    model.append(nn.BatchNorm1d(5, track_running_stats=False))
    model[1].eval()
    model(batch(0))
    before, optimizer = statistics(model), lookbehind(model)
    outputs = []

    def closure():
        optimizer.zero_grad()
        out = model(batch(0))
        outputs.append(out.detach())
        out.square().mean().backward()
        return out.sum()

    with bn_first_pass_only(model):
        optimizer.step(closure)
    assert same_bits(statistics(model), before)
    assert not model[4].track_running_stats
    assert all(out.isfinite().all() for out in outputs)


def test_evaluating_in_the_middle_reads_the_statistics():
    """In eval mode within an outer step, as for a validation on ``slow_weights``."""
    model = network()
    optimizer = lookbehind(model)
    with bn_first_pass_only(model):
        closure_for(model, optimizer, 0)()
        expected = statistics(model)
        model.eval()
        wanted = model(batch(5)).detach()
        model.train()
        optimizer.ascent_step()
        model.eval()
        with optimizer.slow_weights():
            assert torch.equal(model(batch(5)).detach(), wanted)
        model.train()
        assert same_bits(statistics(model), expected)


def test_a_checkpoint_of_the_model_within_the_context_is_an_ordinary_one():
    model = network()
    optimizer = lookbehind(model)
    keys = list(model.state_dict())
    with bn_first_pass_only(model):
        closure_for(model, optimizer, 0)()
        optimizer.ascent_step()
        assert list(model.state_dict()) == keys
    assert values_of(optimizer)
    network().load_state_dict(model.state_dict())


def test_contexts_may_be_nested():
    model = network()
    optimizer = lookbehind(model)
    with bn_first_pass_only(model):
        with bn_first_pass_only(model[1]):
            optimizer.step(closure_for(model, optimizer, 0))
        optimizer.step(closure_for(model, optimizer, 1))
    assert seen(model) == 2


def test_convolutions():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 1))
    optimizer = lookbehind(model)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 1, 4, 4)).square().mean()
        loss.backward()
        return loss

    with bn_first_pass_only(model):
        optimizer.step(closure)
    assert seen(model) == 1
