"""Lookbehind beside the published method: every base, back end, layout and dtype, compared after each phase."""

from __future__ import annotations

import pytest
import torch
from cycles import BASE, FUSED, Bout, Run, each_base, each_kind, each_reuse, judged, two_groups
from helpers import CHUNK, DTYPES, HOLE, ids
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerances import REORDERED, close
from torch import nn

import torsion

ADAPTIVE = {"alpha": "adaptive", "k": 3}
SETTINGS = {
    "k=1": {"k": 1, "alpha": 0.7},
    "k=3": {"k": 3, "rho": 0.3, "alpha": 0.4},
    "adaptive-k=1": {"k": 1, "alpha": "adaptive"},
    "adaptive-k=2": {"k": 2, "alpha": "adaptive"},
    "adaptive-k=3": ADAPTIVE,
    "adaptive-global": {**ADAPTIVE, "alpha_scope": "global"},
    "asam": {"k": 2, "rho": 0.5, "asam": True, "eta": 0.05},
    "asam-adaptive": {**ADAPTIVE, "rho": 0.5, "asam": True, "eta": 0.0},
}
each_setting = pytest.mark.parametrize("chosen", SETTINGS.values(), ids=SETTINGS)


@each_base()
def test_phases(base, fast_target):
    """Two groups, every shape, from nothing to past a chunk."""
    bout = Bout(fast_target, base, two_groups(fast_target, base), {"k": 2, "rho": 0.2, "alpha": 0.6})
    for _ in range(3):
        bout.cycle()


@each_base(*(base.id for base in FUSED))
def test_phases_in_triton(base, triton_target):
    bout = Bout(triton_target, base, two_groups(triton_target, base), {"k": 2, "rho": 0.2, "alpha": 0.6})
    for _ in range(2):
        bout.cycle()


@each_reuse
@each_setting
@each_kind
def test_settings(base, chosen, reuse, fast_target):
    shapes = [(33,), (4, 3, 2, 2), (), (1,), (0, 4), (7, 5)]
    groups = two_groups(fast_target, base, shapes=shapes)
    bout = Bout(fast_target, base, groups, {**chosen, "reuse_gradients": reuse})
    for _ in range(3):
        bout.cycle()


@pytest.mark.parametrize("name", ["adaptive-k=2", "adaptive-global", "asam"])
def test_settings_in_triton(name, triton_target):
    groups = two_groups(triton_target, BASE["sgd-momentum"])
    bout = Bout(triton_target, BASE["sgd-momentum"], groups, SETTINGS[name])
    for _ in range(2):
        bout.cycle()


def test_without_reuse_in_triton(triton_target):
    groups = two_groups(triton_target, BASE["tam"])
    bout = Bout(triton_target, BASE["tam"], groups, {"k": 2, "reuse_gradients": False})
    bout.cycle()


@pytest.mark.parametrize("dtype", DTYPES, ids=ids)
@pytest.mark.parametrize("name", ["k=3", "adaptive-k=3", "asam"])
@each_base("sgd-momentum", "adamw", "tam")
def test_dtypes(base, name, dtype, fast_target):
    """Fast, slow and perturbed weights are kept in float32 for 8 and 11 bits: each phase rounds once, from them."""
    groups = two_groups(fast_target, base, dtype, shapes=[(33,), (4, 7, 3, 3), (), (CHUNK + 37,)])
    bout = Bout(fast_target, base, groups, SETTINGS[name])
    for _ in range(2):
        bout.cycle()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ids)
@pytest.mark.parametrize("name", ["k=3", "adaptive-k=3", "asam"])
@each_base("own-sgd", "own-adamw")
def test_dtypes_on_the_general_path(base, name, dtype, fast_target):
    """Narrower ones in test_lookbehind_precision.py: there the base rounds at each descent."""
    bout = Bout(fast_target, base, two_groups(fast_target, base, dtype), SETTINGS[name])
    for _ in range(2):
        bout.cycle()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_dtypes_in_triton(dtype, triton_target):
    groups = two_groups(triton_target, BASE["tam"], dtype)
    Bout(triton_target, BASE["tam"], groups, ADAPTIVE).cycle()


@pytest.mark.parametrize("grad_layout", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize("layout", ["channels_last", "transposed", "every_second", "misaligned"])
@each_base("sgd-momentum", "adamw", "own-sgd")
def test_layouts(base, layout, grad_layout, fast_target):
    shapes = [(5, 3, 4, 2), (129, 130), (33,), ()]
    groups = two_groups(fast_target, base, torch.float32, layout, shapes)
    bout = Bout(fast_target, base, groups, {"k": 2, "asam": True, "alpha": "adaptive"}, grad_layout)
    for _ in range(2):
        bout.cycle()


@pytest.mark.parametrize("layout", ["every_second", "misaligned"])
@each_base("sgd", "own-sgd")
def test_what_lies_between_the_elements_is_not_touched(base, layout, fast_target):
    """A parameter that is a view with holes, or begins one element into its memory."""
    groups = two_groups(fast_target, base, torch.float32, layout, [(33,), (17, 5)])
    bout = Bout(fast_target, base, groups)
    for _ in range(2):
        bout.cycle()
    for p in bout.params:
        memory = torch.empty(0, device=p.device).set_(p.detach().untyped_storage())
        holes = memory[1::2] if layout == "every_second" else memory[:1]
        assert (holes == HOLE).all()


@each_reuse
@each_kind
def test_absent_gradients_are_neither_in_the_norm_nor_moved(base, reuse, fast_target):
    groups = two_groups(fast_target, base, shapes=[(33,), (4, 3), (5,), (6,)])
    bout = Bout(fast_target, base, groups, {"k": 2, "alpha": "adaptive", "reuse_gradients": reuse})
    for absent in ((), (0, 3), (1,), ()):
        bout.cycle(absent)


def test_mixed_dtypes(fast_target):
    base = BASE["sgd"]
    params = [fast_target.parameter(torch.randn(n), d) for n, d in zip((9, 40, 20, 7), DTYPES, strict=True)]
    bout = Bout(fast_target, base, [{"params": params}], {"k": 3, "alpha": "adaptive", "rho": 0.5})
    for _ in range(2):
        bout.cycle()


@each_kind
def test_many_tensors(base, compiled_target):
    """More than one launch's table would hold if it travelled in the arguments."""
    groups = two_groups(compiled_target, base, torch.float32, shapes=[(1 + i % 7,) for i in range(300)])
    Bout(compiled_target, base, groups, {"k": 2, "alpha": "adaptive"}).cycle()


# Networks: the gradients depend on the perturbed weights, so that a wrong one shows in everything after it


@each_reuse
@each_base()
def test_network(base, reuse, compiled_target):
    run = Run(compiled_target, base, {"k": 3, "rho": 0.1, "alpha": 0.6, "reuse_gradients": reuse}, torch.float64)
    judge, cycle = judged(run)
    for step in range(4):
        run.step(step)
        cycle(step)
        for p, wanted in zip(run.model.parameters(), judge.slow, strict=True):
            close(p, wanted, REORDERED, f"cycle {step}")


def test_network_of_convolutions(fast_target):
    def make(dtype, device):
        torch.manual_seed(1)
        layers = nn.Conv2d(1, 4, (1, 3)), nn.Tanh(), nn.Flatten(), nn.Linear(16, 2)
        model = nn.Sequential(nn.Unflatten(1, (1, 1, 6)), *layers).to(device, dtype)
        return model.to(memory_format=torch.channels_last)

    chosen = {"k": 2, "alpha": "adaptive", "asam": True, "rho": 0.5}
    run = Run(fast_target, BASE["sgd-momentum"], chosen, torch.float64, make)
    judge, cycle = judged(run)
    for step in range(4):
        run.step(step)
        cycle(step)
    for p, wanted in zip(run.model.parameters(), judge.slow, strict=True):
        close(p, wanted, REORDERED)


def test_sam_network(fast_target):
    run = Run(fast_target, BASE["sgd-momentum"], {"rho": 0.3}, torch.float64, cls=torsion.SAM)
    twin = Run(fast_target, BASE["sgd-momentum"], {"rho": 0.3, "k": 1, "alpha": 1.0}, torch.float64)
    judge, cycle = judged(twin)
    for step in range(4):
        run.step(step)
        cycle(step)
        for p, wanted in zip(run.model.parameters(), judge.slow, strict=True):
            close(p, wanted, REORDERED, f"cycle {step}")


@settings(max_examples=30)
@given(
    base=st.sampled_from(FUSED),
    k=st.integers(1, 6),
    rho=st.floats(0.0, 1.0),
    alpha=st.one_of(st.just("adaptive"), st.floats(0.0, 1.0)),
    alpha_scope=st.sampled_from(["tensor", "global"]),
    asam=st.booleans(),
    eta=st.floats(0.0, 0.5),
    reuse_gradients=st.booleans(),
    shapes=st.lists(st.sampled_from([(3,), (2, 5), (), (0,), (40,)]), min_size=2, max_size=5),
)
def test_any_settings(compiled_target, base, shapes, **chosen):
    bout = Bout(compiled_target, base, two_groups(compiled_target, base, shapes=shapes), chosen)
    for _ in range(2):
        bout.cycle()
