"""Bad input: the message names the parameter or argument, the value and the remedy, and nothing has changed."""

from __future__ import annotations

import math
import re

import pytest
import torch
from helpers import each_class, same_bits, snapshot, take_steps
from torch import nn

import torsion
from torsion.optim import _checks

INF, NAN = math.inf, math.nan
ADAPTIVE = (torsion.AdaTAM, torsion.AdaTAMW)


def parameters():
    return [nn.Parameter(torch.arange(6.0).reshape(2, 3)), nn.Parameter(torch.ones(4))]


def named():
    return list(zip(("layer.weight", "layer.bias"), parameters(), strict=True))


# Constructor arguments: name, value, error, what the message must say besides name and value

ANY = [
    ("lr", -1.0, ValueError, ">= 0"),
    ("lr", INF, ValueError, "finite"),
    ("lr", NAN, ValueError, "finite"),
    ("lr", "0.1", TypeError, "number"),
    ("lr", None, TypeError, "number"),
    ("lr", True, TypeError, "number"),
    ("lr", 1j, TypeError, "number"),
    ("weight_decay", -0.1, ValueError, ">= 0"),
    ("weight_decay", INF, ValueError, "finite"),
    ("weight_decay", NAN, ValueError, "finite"),
    ("weight_decay", "a lot", TypeError, "number"),
    ("eps_damping", -1e-8, ValueError, ">= 0"),
    ("eps_damping", NAN, ValueError, "finite"),
    ("eps_damping", None, TypeError, "number"),
    ("decay", -0.1, ValueError, "[0, 1]"),
    ("decay", 1.5, ValueError, "[0, 1]"),
    ("decay", NAN, ValueError, "[0, 1]"),
    ("decay", [0.9], TypeError, "number"),
    ("max_grad_norm", 0.0, ValueError, "None for no clipping"),
    ("max_grad_norm", -1.0, ValueError, "None for no clipping"),
    ("max_grad_norm", NAN, ValueError, "None for no clipping"),
    ("max_grad_norm", "1", TypeError, "number"),
    ("scope", "model", ValueError, "'global', 'group', 'tensor'"),
    ("scope", "Global", ValueError, "'global', 'group', 'tensor'"),
    ("scope", None, TypeError, "'global', 'group', 'tensor'"),
    ("scope", ["global"], TypeError, "'global', 'group', 'tensor'"),
    ("maximize", 1, TypeError, "True or False"),
    ("maximize", "yes", TypeError, "True or False"),
    ("maximize", None, TypeError, "True or False"),
    ("stochastic_rounding", 1.0, TypeError, "True or False"),
    ("backend", "gpu", ValueError, "'cuda', 'triton', 'cpu', 'reference'"),
    ("backend", 3, TypeError, "'cuda', 'triton', 'cpu', 'reference'"),
    ("backend", "cuda", ValueError, "these are on cpu"),
]
TAM_ONLY = [
    ("momentum", -0.1, ValueError, "[0, 1)"),
    ("momentum", 1.0, ValueError, "[0, 1)"),
    ("momentum", NAN, ValueError, "[0, 1)"),
    ("momentum", "heavy", TypeError, "number"),
    ("momentum", False, TypeError, "number"),
    ("init", "ones", ValueError, "'zero', 'clone'"),
    ("init", 0, TypeError, "'zero', 'clone'"),
    ("decoupled_weight_decay", "yes", TypeError, "True or False"),
    ("decoupled_weight_decay", 0.1, TypeError, "True or False"),
]
ADAPTIVE_ONLY = [
    ("betas", (1.0, 0.9), ValueError, "[0, 1)"),
    ("betas", (0.9, 1.0), ValueError, "[0, 1)"),
    ("betas", (-0.1, 0.9), ValueError, "[0, 1)"),
    ("betas", (0.9, NAN), ValueError, "[0, 1)"),
    ("betas", (0.9,), ValueError, "two numbers"),
    ("betas", (0.9, 0.99, 0.999), ValueError, "two numbers"),
    ("betas", 0.9, TypeError, "two numbers"),
    ("betas", ("0.9", 0.99), TypeError, "number"),
    ("eps", -1e-8, ValueError, ">= 0"),
    ("eps", INF, ValueError, "finite"),
    ("eps", None, TypeError, "number"),
    ("bias_correction", 1, TypeError, "True or False"),
]
ARGUMENTS = [
    *((cls, *row) for cls in (torsion.TAM, *ADAPTIVE) for row in ANY),
    *((torsion.TAM, *row) for row in TAM_ONLY),
    *((cls, *row) for cls in ADAPTIVE for row in ADAPTIVE_ONLY),
]


def _shown(name, value):
    """How a message may show the value: whole, or for betas the one at fault."""
    values = [value, *(value if isinstance(value, (tuple, list)) else ())]
    return [f"{name}={v!r}" for v in values] + [f"{name}[{k}]={v!r}" for k, v in enumerate(values[1:])]


@pytest.mark.parametrize(
    ("cls", "name", "value", "error", "remedy"),
    ARGUMENTS,
    ids=[f"{a[0].__name__}-{a[1]}={a[2]!r}" for a in ARGUMENTS],
)
def test_argument(cls, name, value, error, remedy):
    with pytest.raises(error) as caught:
        cls(parameters(), **{name: value})
    message = str(caught.value)
    assert any(shown in message for shown in _shown(name, value)), message
    assert remedy in message, message


@pytest.mark.parametrize(
    ("rate", "error", "remedy"),
    [
        (torch.ones(2), ValueError, "a group per rate"),
        (torch.ones(0), ValueError, "one number"),
        (torch.tensor(1), TypeError, r"\.float\(\)"),
        (torch.tensor(0.1, dtype=torch.bfloat16), TypeError, r"\.float\(\)"),
        (torch.tensor(0.1j), TypeError, r"\.float\(\)"),
    ],
    ids=["two", "none", "int64", "bfloat16", "complex"],
)
@each_class
def test_rate_in_a_tensor(cls, rate, error, remedy):
    with pytest.raises(error, match=f"^lr: .*{remedy}"):
        cls(parameters(), lr=rate)


@pytest.mark.parametrize(
    "name", ["foreach", "fused", "capturable", "differentiable", "nesterov", "dampening", "amsgrad"]
)
@pytest.mark.parametrize("value", [True, False, None])
@each_class
def test_arguments_of_torch_that_do_not_apply_say_why(cls, name, value):
    with pytest.raises(TypeError, match=f"^{cls.__name__} does not take {name}=: ...") as caught:
        cls(parameters(), **{name: value})
    assert "unexpected" not in str(caught.value)


@each_class
def test_an_unknown_argument_is_pointed_to_the_help(cls):
    with pytest.raises(TypeError, match=rf"'learning_rate'.*help\(torsion\.{cls.__name__}\)"):
        cls(parameters(), learning_rate=0.1)


def test_the_environment_names_a_back_end_that_is_none(monkeypatch):
    monkeypatch.setenv("TORSION_BACKEND", "fast")
    with pytest.raises(ValueError, match=r"TORSION_BACKEND='fast'.*cuda, triton, cpu, reference"):
        torsion.TAM(parameters())
    torsion.TAM(parameters(), backend="reference")  # wins over the environment


# Parameters


@each_class
def test_no_parameters(cls):
    for empty in ([], (), iter([]), nn.Identity().parameters(), nn.Identity().named_parameters()):
        with pytest.raises(ValueError, match=rf"^{cls.__name__}: params=\[\] is empty; pass model\.parameters\(\)"):
            cls(empty)


def test_a_generator_used_up():
    params = nn.Linear(2, 2).parameters()
    torsion.TAM(params)
    with pytest.raises(ValueError, match="a generator runs only once"):
        torsion.AdaTAM(params)


@pytest.mark.parametrize("params", [torch.ones(2), [[1.0]], ["weight"], [nn.Linear(2, 2)], 3, None, "weight"], ids=repr)
def test_what_is_no_parameter_list(params):
    with pytest.raises(TypeError):
        torsion.TAM(params)


def test_a_tensor_that_is_computed():
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(ValueError, match="non-leaf"):
        torsion.TAM([w * 2])


@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [(torch.complex64, "view_as_real"), (torch.int64, "float32"), (torch.float8_e4m3fn, "bfloat16")],
    ids=str,
)
def test_a_dtype_the_kernels_do_not_know(dtype, remedy):
    good, bad = nn.Parameter(torch.ones(2)), torch.zeros(2).to(dtype)
    with pytest.raises(TypeError, match=f"^layer.bias: .*{dtype}.*{remedy}"):
        torsion.TAM([("layer.weight", good), ("layer.bias", bad)])


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_given_twice():
    p, q = parameters()
    with pytest.raises(
        ValueError, match=r"^parameter 2 of group 0: is given twice; list it once .*parameter 0 of group 0"
    ):
        torsion.TAM([p, q, p])
    with pytest.raises(ValueError, match="more than one parameter group"):
        torsion.TAM([{"params": [p]}, {"params": [q, p]}])


def test_parameters_on_two_kinds_of_device():
    """The meta device stands for a GPU: what counts is that the types differ."""
    cpu, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, device="meta"))
    with pytest.raises(ValueError, match=r"parameters are on cpu and meta; .*move the model to one device"):
        torsion.TAM([cpu, other])
    with pytest.raises(ValueError, match="parameters are on cpu and meta"):
        torsion.TAM([{"params": [cpu]}, {"params": [other]}])


def test_half_the_model_moved_after_construction():
    optimizer = torsion.TAM(parameters())
    params = optimizer.param_groups[0]["params"]
    take_steps(optimizer, [[torch.ones_like(p) for p in params]])
    before = snapshot(optimizer)
    held = params[1]
    params[1] = nn.Parameter(torch.ones(4, device="meta"))
    params[1].grad = torch.ones(4, device="meta")
    with pytest.raises(ValueError, match="parameters are on cpu and meta"):
        optimizer.step()
    params[1] = held
    assert same_bits(snapshot(optimizer), before)


# Groups

DISAGREEMENTS = {"scope": "tensor", "max_grad_norm": 2.0, "decay": 0.5, "eps_damping": 1e-3}


@pytest.mark.parametrize("name", [*DISAGREEMENTS, "init"])
def test_groups_that_must_agree(name):
    value = {**DISAGREEMENTS, "init": "clone"}[name]
    p, q = parameters()
    with pytest.raises(ValueError, match=rf"^group 1: {name}={value!r}, group 0 has .* so give all groups one value"):
        torsion.TAM([{"params": [p]}, {"params": [q], name: value}])


@pytest.mark.parametrize("name", ["decay", "eps_damping"])
@each_class
def test_scopes_of_their_own_may_smooth_as_they_like(cls, name):
    p, q = parameters()
    optimizer = cls([{"params": [p]}, {"params": [q], name: 0.5}], scope="group")
    take_steps(optimizer, [[torch.ones_like(p), torch.ones_like(q)]])


def test_a_group_is_named_in_its_errors():
    p, q = parameters()
    with pytest.raises(ValueError, match=r"^group 1: lr=-1: must be finite and >= 0"):
        torsion.TAM([{"params": [p]}, {"params": [q], "lr": -1}])
    with pytest.raises(TypeError, match=r"^group 1: sr_seed='a': must be an integer"):
        torsion.TAM([{"params": [p]}, {"params": [q], "sr_seed": "a"}])
    with pytest.raises(ValueError, match=r"^group 1: sr_seed=-1: must lie in \[0, 2\^53\)"):
        torsion.TAM([{"params": [p]}, {"params": [q], "sr_seed": -1}])


# Gradients: what to do to the second parameter, the error, what the message must say


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


def _complex_grad(p):
    p.data = torch.ones(4, dtype=torch.complex64)
    p.grad = torch.ones(4, dtype=torch.complex64)
    p.data = torch.ones(4)


def _expanded(p):
    p.data = torch.ones(1).expand(4)
    p.grad = torch.ones(4)


def _overlapping(p):
    p.data = torch.ones(7).as_strided((4, 2), (1, 2))
    p.grad = torch.ones(4, 2)


GRADIENTS = {
    "sparse": (_sparse, RuntimeError, "grad is sparse (torch.sparse_coo)", ".to_dense()"),
    "wrong-shape": (_wrong_shape, ValueError, "grad has shape (4,), the parameter (5,)", "zero_grad()"),
    "wrong-dtype": (
        _wrong_dtype,
        TypeError,
        "grad is torch.float32, the parameter torch.bfloat16",
        "cast the gradient",
    ),
    "complex": (_complex, TypeError, "complex", "view_as_real"),
    "complex-gradient": (_complex_grad, TypeError, "grad is complex", "view_as_real"),
    "expanded": (_expanded, ValueError, "share memory (strides (0,))", ".contiguous()"),
    "overlapping": (_overlapping, ValueError, "share memory (strides (1, 2))", ".contiguous()"),
}


@pytest.mark.parametrize("stepped", [False, True], ids=["first-step", "later"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize(("spoil", "error", "found", "remedy"), GRADIENTS.values(), ids=GRADIENTS)
def test_gradient(spoil, error, found, remedy, backend, stepped):
    pairs = named()
    optimizer = torsion.TAM(pairs, lr=0.1, backend=backend)
    (_, good), (name, bad) = pairs
    if stepped:
        take_steps(optimizer, [[torch.ones_like(p) for _, p in pairs]] * 2)
    good.grad = torch.ones_like(good)
    held, bad.grad = bad.data, None
    before, skipped = snapshot(optimizer), optimizer.skipped_steps()
    spoil(bad)
    for _ in range(2):
        with pytest.raises(error, match=f"^{re.escape(name)}: ") as caught:
            optimizer.step()
        assert found in str(caught.value)
        assert remedy in str(caught.value)
    bad.grad = None
    bad.data = held
    assert same_bits(snapshot(optimizer), before)
    assert bool(optimizer.state) == stepped, "no state is made for a step that does not happen"
    assert torch.equal(optimizer.skipped_steps(), skipped)
    optimizer.step()


def test_gradient_on_another_device():
    """torch lets nobody attach one without a GPU, so the check is called by itself; the next test has one."""
    with pytest.raises(ValueError, match=r"^layer\.bias: grad is on meta, the parameter on cpu; move them together"):
        _checks.gradient("layer.bias", torch.ones(4), torch.ones(4, device="meta"))


@pytest.mark.cuda
def test_a_parameter_that_left_its_gradient_behind():
    pairs = named()
    optimizer = torsion.TAM(pairs)
    for _, p in pairs:
        p.grad = torch.ones_like(p)
        p.data = p.data.cuda()
    with pytest.raises(
        ValueError, match=r"^layer\.weight: grad is on cpu, the parameter on cuda:0; move them together"
    ):
        optimizer.step()


def test_two_parameters_over_one_memory():
    shared = torch.ones(4)
    optimizer = torsion.TAM([("a", nn.Parameter(shared)), ("b", nn.Parameter(shared.view(2, 2)))])
    for p in optimizer.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"^b: shares memory; make both one Parameter .*the other is a"):
        optimizer.step()
    assert torch.equal(shared, torch.ones(4))


# State


@pytest.mark.parametrize(
    ("value", "found"),
    [(torch.zeros(3), "has shape (3,)"), (None, "is NoneType"), (0.0, "is float")],
    ids=["shape", "none", "number"],
)
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_state_the_user_broke(key, value, found):
    pairs = named()
    optimizer = torsion.AdaTAM(pairs)
    take_steps(optimizer, [[torch.ones_like(p) for _, p in pairs]])
    p = pairs[1][1]
    held = optimizer.state[p][key]
    before = snapshot(optimizer)
    optimizer.state[p][key] = value
    with pytest.raises(ValueError, match=re.escape(f"layer.bias: state {key!r} {found}, needs shape (4,)")):
        optimizer.step()
    optimizer.state[p][key] = held
    assert same_bits(snapshot(optimizer), before)


def test_state_of_another_optimizer():
    pairs = named()
    optimizer = torsion.TAM(pairs)
    pairs[0][1].grad = torch.ones_like(pairs[0][1])
    optimizer.state[pairs[0][1]]["exp_avg"] = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^layer\.weight: state 'momentum_buffer' is NoneType"):
        optimizer.step()


# Learning rate tensors that go bad later


def test_a_rate_replaced_by_a_tensor_that_does_not_fit():
    params = parameters()
    optimizer = torsion.TAM(params)
    take_steps(optimizer, [[torch.ones_like(p) for p in params]])
    before = snapshot(optimizer)
    optimizer.param_groups[0]["lr"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"^lr: a tensor must hold one number"):
        optimizer.step()
    assert same_bits(snapshot(optimizer), before)
