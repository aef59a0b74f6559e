"""State, parameters and groups in the user's hands between steps, and memory that goes when its owner goes."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from helpers import each_class, ids, same_bits, snapshot, take_steps
from small import MOMENTUM, gradients, pair, parameters, spoil
from torch import nn

import torsion

# State in the user's hands


@each_class
def test_state_is_tensors_under_torchs_names(cls):
    optimizer = cls(parameters(), lr=0.01)
    take_steps(optimizer, gradients(2))
    keys = ["step", "momentum_buffer"] if cls is torsion.TAM else ["step", "exp_avg", "exp_avg_sq"]
    for p, state in optimizer.state.items():
        assert list(state) == [*keys, "correlation"]
        assert state["step"].shape == state["correlation"].shape == ()
        assert state["step"].dtype == state["correlation"].dtype == torch.float32
        assert float(state["step"]) == 2
        assert all(state[k].shape == p.shape for k in keys[1:])


@pytest.mark.parametrize("how", ["in-place", "replaced", "number"])
@each_class
def test_state_edited_between_steps_counts(cls, how):
    optimizer, other = pair(cls, scope="tensor")
    grads = gradients(4)
    take_steps(optimizer, grads[:2])
    take_steps(other, grads[:2])
    for o in (optimizer, other):
        p = o.param_groups[0]["params"][0]
        state = o.state[p]
        if o is other:  # known to work: a checkpoint
            checkpoint = copy.deepcopy(o.state_dict())
            checkpoint["state"][0].update(step=torch.tensor(7.0), correlation=torch.tensor(0.5))
            checkpoint["state"][0][MOMENTUM[cls]].fill_(0.25)
            o.load_state_dict(checkpoint)
        elif how == "in-place":
            state["step"].fill_(7)
            state["correlation"].fill_(0.5)
            state[MOMENTUM[cls]].fill_(0.25)
        else:
            tensor = how == "replaced"
            state["step"] = torch.tensor(7.0) if tensor else 7
            state["correlation"] = torch.tensor(0.5) if tensor else 0.5
            state[MOMENTUM[cls]] = torch.full_like(p, 0.25)
    take_steps(optimizer, grads[2:])
    take_steps(other, grads[2:])
    assert float(optimizer.state[optimizer.param_groups[0]["params"][0]]["step"]) == 9
    assert same_bits(snapshot(optimizer), snapshot(other))


@pytest.mark.parametrize("scope", ["global", "tensor"])
@each_class
def test_state_cleared_is_a_new_start(cls, scope):
    optimizer = cls(parameters(), lr=0.01, scope=scope)
    grads = gradients(4)
    take_steps(optimizer, grads[:3])
    optimizer.state.clear()
    assert optimizer.cosine() == {}
    fresh = cls([nn.Parameter(p.detach().clone()) for p in optimizer.param_groups[0]["params"]], lr=0.01, scope=scope)
    for o in (optimizer, fresh):
        take_steps(o, grads[1:])
    assert same_bits(snapshot(optimizer), snapshot(fresh))


def test_state_of_one_parameter_deleted_starts_that_one_anew():
    optimizer = torsion.AdaTAM(parameters(), bias_correction=True)
    take_steps(optimizer, gradients(3))
    p, q, _ = optimizer.param_groups[0]["params"]
    scope = float(optimizer.state[q]["correlation"])
    del optimizer.state[p]
    spoil([p])
    optimizer.step()  # skipped, but the state is made
    assert float(optimizer.state[p]["step"]) == 0
    assert not optimizer.state[p]["exp_avg"].any()
    assert float(optimizer.state[p]["correlation"]) == scope
    assert float(optimizer.state[q]["step"]) == 3


def test_a_parameter_removed_by_hand():
    optimizer, other = pair(torsion.TAM, scope="tensor")
    grads = gradients(3)
    for o in (optimizer, other):
        take_steps(o, grads[:1])
    second = optimizer.cosine()["0.1"]
    gone = optimizer.param_groups[0]["params"].pop(0)
    del optimizer.state[gone]
    assert torch.equal(optimizer.cosine()["0.0"], second), "the second is the first now"
    take_steps(optimizer, [g[1:] for g in grads[1:]])
    take_steps(other, grads[1:])
    for p, q in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"][1:], strict=True):
        assert torch.equal(p, q)
        assert same_bits(list(optimizer.state[p].values()), list(other.state[q].values()))
    assert len(optimizer.cosine()) == 2


@each_class
def test_data_swapped_for_other_memory(cls):
    optimizer, other = pair(cls)
    grads = gradients(4)
    keep = []
    for step in grads:
        for p in optimizer.param_groups[0]["params"]:
            keep.append(p.data)
            p.data = p.data.clone()
        for o in (optimizer, other):
            take_steps(o, [step])
    assert same_bits(snapshot(optimizer), snapshot(other))


def test_data_transposed_in_place():
    """The same address, the same sizes, the same gradient memory: only the strides tell."""
    p, q = nn.Parameter(torch.arange(9.0).reshape(3, 3)), nn.Parameter(torch.arange(9.0).reshape(3, 3).t().contiguous())
    optimizer, other = torsion.TAM([p], lr=0.1), torsion.TAM([q], lr=0.1)
    p.grad, q.grad = torch.randn(3, 3), torch.zeros(3, 3)
    optimizer.step()
    p.data = p.data.t()
    before = p.detach().clone()
    q.data = before.clone()
    other.state[q].update(
        step=torch.tensor(1.0),
        momentum_buffer=optimizer.state[p]["momentum_buffer"].clone(),
        correlation=torch.tensor(0.0),
    )
    q.grad = p.grad.clone()
    for o in (optimizer, other):
        o.step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("to", [torch.bfloat16, torch.float64], ids=ids)
@each_class
def test_a_model_converted_after_construction(cls, to):
    model = nn.Linear(3, 2)
    optimizer = cls(model.parameters(), lr=0.01)
    x = torch.randn(4, 3)
    for dtype in (torch.float32, to, torch.float32):
        model.to(dtype)
        model.zero_grad()
        model(x.to(dtype)).square().sum().backward()
        optimizer.step()
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        for p in model.parameters():
            assert p.dtype == dtype
            assert optimizer.state[p][MOMENTUM[cls]].dtype == wide
            assert optimizer.state[p]["correlation"].dtype == wide
            assert p.isfinite().all()
    assert float(optimizer.state[model.weight]["step"]) == 3
    assert float(optimizer.damping()["global"]) > 0.5, "the cosine was kept"


def test_deepcopy_and_pickle_go_on_alike():
    optimizer = torsion.AdaTAMW(parameters(), lr=0.01, backend="reference", scope="tensor")
    grads = gradients(4)
    take_steps(optimizer, grads[:2])
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    take_steps(optimizer, grads[2:])
    for other in copies:
        assert other._backend == "reference"
        take_steps(other, grads[2:])
        assert same_bits(snapshot(other), snapshot(optimizer))


def test_a_pickle_of_an_older_version_gets_the_options_it_lacks():
    optimizer = torsion.TAM(parameters(), lr=0.01)
    take_steps(optimizer, gradients(1))
    state = optimizer.__getstate__()
    for key in ("max_grad_norm", "sr_seed"):
        del state["param_groups"][0][key]
    del state["_backend"]
    other = torsion.TAM.__new__(torsion.TAM)
    other.__setstate__(state)
    take_steps(other, gradients(1))


def test_two_optimizers_with_disjoint_parameters_do_not_mix():
    a, b = pair(torsion.TAM)
    alone = torsion.TAM(parameters(), lr=0.01)
    for step in gradients(3):
        take_steps(a, [step])
        take_steps(b, [[-g for g in step]])
        take_steps(alone, [step])
    assert same_bits(snapshot(a), snapshot(alone))


# Memory


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_nothing_keeps_a_finished_run_alive(backend):
    def run():
        model = nn.Linear(3, 2)
        optimizer = torsion.TAM(model.parameters(), backend=backend)
        optimizer.register_step_post_hook(lambda o, *_: optimizer.param_groups)  # a cycle through the optimizer
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        state = optimizer.state[model.weight]["momentum_buffer"]
        return [weakref.ref(o) for o in (optimizer, model.weight, model.weight.grad, state)]

    references = run()
    gc.collect()
    assert [r() for r in references] == [None] * 4


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("layout", ["contiguous", "with-holes"])
def test_gradients_go_with_zero_grad(backend, layout):
    data = torch.randn(4, 6)
    p = nn.Parameter(data if layout == "contiguous" else data[:, ::2])
    optimizer = torsion.TAM([p], backend=backend)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        reference = weakref.ref(p.grad)
        optimizer.step()
        optimizer.zero_grad()
        gc.collect()
        assert reference() is None


def test_a_removed_parameter_is_let_go_at_the_next_step():
    optimizer = torsion.TAM(parameters())
    take_steps(optimizer, gradients(2))
    gone = optimizer.param_groups[0]["params"].pop()
    reference = weakref.ref(gone)
    del optimizer.state[gone], gone
    take_steps(optimizer, [gradients(1)[0][:2]])
    gc.collect()
    assert reference() is None
