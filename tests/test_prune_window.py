"""Which units a window of batches calls live: criteria, modes, random state, numbers that are not finite."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from prune_models import MODELS, build, kill, mlp, rows, same, snapshot
from torch import nn

from torsion.prune import live_units
from torsion.prune._cut import cut
from torsion.prune._keep import align_and_keep
from torsion.prune._structure import trace
from torsion.prune._window import mark_active_, observe

GOLDEN = {c["id"]: c for c in json.loads((Path(__file__).parent / "golden" / "demp.json").read_text())["cases"]}


class Given(nn.Module):
    """Linear of identity, then ``act``, then a reader: activations are what a test says."""

    def __init__(self, width, act=nn.Identity()):  # noqa: B008
        super().__init__()
        self.a, self.act, self.b = nn.Linear(width, width, bias=False), act, nn.Linear(width, 1)
        with torch.no_grad():
            self.a.weight.copy_(torch.eye(width))
        self.double()

    def forward(self, x):
        return self.b(self.act(self.a(x)))


class Softsign(nn.Module):
    """An activation that keeps the sign: what is not live by one criterion may be by another."""

    def forward(self, x):
        return F.softsign(x)


def test_golden_criteria():
    case = GOLDEN["D1"]
    y = torch.tensor(case["inputs"]["y"], dtype=torch.float64)
    taus = {"ever_active": case["inputs"]["tau_ever_active"], "abs_max": case["inputs"]["tau_abs_max"], "sum_le": 0.0}
    for criterion, expected in case["expected"].items():
        for channel_dim, given in ((1, y), (-1, y), (0, y.T)):
            flags = torch.zeros(5, dtype=torch.uint8)
            mark_active_(given, flags, channel_dim, criterion, taus[criterion])
            assert flags.tolist() == expected, criterion
        # Through a model: softsign is monotone and odd, so that only thresholds on sizes move.
        if criterion == "ever_active":
            assert live_units(Given(5, Softsign()), [y], criterion)["a"].int().tolist() == expected


def test_flags_are_or_ed():
    flags = torch.tensor([1, 0, 0], dtype=torch.uint8)
    mark_active_(torch.tensor([[0.0, 1.0, 0.0]]), flags, 1, "ever_active", 0.0)
    assert flags.tolist() == [1, 1, 0]
    mark_active_(torch.full((2, 3, 2), float("nan")), flags, 1, "abs_max", 0.0)
    assert flags.tolist() == [1, 1, 1]


def hooked(model, batches, names):
    """The same by forward hooks on the activation modules: live where any output is not 0."""
    found = {}
    hooks = []
    for layer, act in names.items():

        def hook(_, __, y, layer=layer):
            live = (y != 0).movedim(1, -1).flatten(0, -2).any(0)
            found[layer] = found.get(layer, False) | live

        hooks.append(model.get_submodule(act).register_forward_hook(hook))
    model.eval()
    with torch.no_grad():
        for x in batches:
            model(x)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("name", "acts"),
    [
        ("mlp", {"0": "1", "2": "3"}),
        ("mlp_gelu", {"0": "1", "2": "3"}),
        ("mlp_bn", {"0": "2"}),
        ("cnn", {"0": "2", "4": "5", "8": "9"}),
        ("cnn_inplace", {"0": "2", "4": "5", "8": "9"}),
    ],
)
def test_masks_are_those_of_hooks_on_the_activations(name, acts, seed):
    model, x = build(name, seed)
    with torch.no_grad():
        for layer in acts:
            width = model.get_submodule(layer).weight.shape[0]
            last = model.get_submodule(str(int(layer) + 1))
            owner = last if isinstance(last, nn.modules.batchnorm._BatchNorm) else model.get_submodule(layer)
            gone = torch.rand(width, generator=torch.Generator().manual_seed(seed)) < 0.4
            owner.weight[gone], owner.bias[gone] = 0, 0 if "gelu" in name else -0.1
    batches = x.chunk(2)
    expected = hooked(model, batches, acts)
    live = live_units(model.train(), batches)
    assert list(live) == list(acts)
    assert all(torch.equal(live[n], expected[n]) for n in acts)
    assert not all(mask.all() for mask in live.values())
    assert model.training


def test_window_is_the_or_over_batches_and_draws_no_more_than_it_is_told():
    model = Given(3, nn.ReLU())
    structure = trace(model, torch.zeros(2, 3).double())
    drawn = []

    def batches():
        for i in range(3):
            drawn.append(i)
            yield torch.eye(3, dtype=torch.float64)[i : i + 1]
        raise AssertionError("drawn too many")

    window = observe(model, structure, batches(), 2)
    assert drawn == [0, 1]
    assert window.live["a"].tolist() == [True, True, False]
    assert window.batches == len(window.inputs) == 2
    assert window.mean["a"].tolist() == [0.5, 0.5, 0.0]
    assert observe(model, structure, [torch.eye(3).double()], 5).batches == 1


def test_empty_windows_know_nothing():
    model = mlp()
    structure = trace(model, rows())
    window = observe(model, structure, [], 4)
    assert window.batches == 0
    assert all(mask.all() for mask in window.live.values())
    with pytest.warns(UserWarning, match="`batches` is empty"):
        assert live_units(model, []) == {}


@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes(name):
    model, x = build(name)
    held = snapshot(model)
    live_units(model, [x, x], "abs_max")
    live_units(model, lambda: iter([x]), "dormant", 0.1)
    assert same(held, snapshot(model))


def test_live_over_tied_layers_is_or_ed_over_every_addition():
    model, x = build("residual", 3)
    with torch.no_grad():
        for bn in (model.bn0, model.bn2):
            bn.weight[:2], bn.bias[:2] = 0, 0
    live = live_units(model, [x])
    assert live["stem"].tolist()[:2] == [False, False]
    assert torch.equal(live["stem"], live["conv2"])
    with torch.no_grad():
        model.bn2.bias[0] = 1.0  # after the second addition unit 0 is active
        model.bn0.bias[1] = 1.0  # after the stem unit 1 is
    live = live_units(model, [x])
    assert live["stem"].tolist()[:2] == live["conv2"].tolist()[:2] == [True, True]


def test_a_gated_unit_lives_where_its_product_does():
    model, x = build("gated", 1)
    with torch.no_grad():
        model.up.weight[0] = 0  # the gate's own activation stays alive
        model.gate.weight[1] = 0
        model.first.weight[2], model.first.bias[2] = 0, 0
        model.first.weight[6 + 3], model.first.bias[6 + 3] = 0, -1e4  # sigmoid(-1e4) = 0
        model.second.weight[7 + 4], model.second.bias[7 + 4] = 0, 0
    live = live_units(model, [x])
    assert list(live) == ["first", "second", "gate"]
    assert (~live["gate"]).nonzero().flatten().tolist() == [0, 1]
    assert (~live["first"]).nonzero().flatten().tolist() == [2, 3, 8, 9]
    assert (~live["second"]).nonzero().flatten().tolist() == [4, 11]


def test_squeeze_and_excitation_does_not_hide_a_dead_unit():
    model, x = build("mobile", 2)
    with torch.no_grad():
        for bn in (model.bn1, model.bn2):
            bn.weight[5], bn.bias[5] = 0, 0
    live = live_units(model, [x])
    assert not live["expand"][5]
    assert not live["depthwise"][5]
    with torch.no_grad():
        model.bn2.bias[5] = 1.0
    assert live_units(model, [x])["expand"][5]


def test_saturation_is_where_the_derivative_vanishes():
    x = torch.tensor([[0.0, 400.0, -1.0], [1.0, -400.0, -2.0]], dtype=torch.float64)
    assert live_units(Given(3, nn.Tanh()), [x], "saturation")["a"].tolist() == [True, False, True]
    for inplace in (True, False):
        assert live_units(Given(3, nn.ReLU(inplace)), [x], "saturation")["a"].tolist() == [True, True, False]
    assert live_units(Given(3, nn.Tanh()), [x], "saturation", 0.9)["a"].tolist() == [True, False, False]
    assert live_units(Given(3, nn.Tanh()), [x])["a"].all()


def test_dormant_compares_means_within_the_layer():
    y = torch.tensor([[1.0, 0.01, 0.0, 0.5], [1.0, 0.03, 0.0, 0.5]], dtype=torch.float64)  # mean of means: 0.38
    model = Given(4, nn.ReLU())
    assert live_units(model, [y], "dormant")["a"].tolist() == [True, True, False, True]
    assert live_units(model, [y], "dormant", 0.1)["a"].tolist() == [True, False, False, True]
    assert live_units(model, [y], "dormant", 1.5)["a"].tolist() == [True, False, False, False]


def test_sum_le_asks_every_batch():
    batches = [torch.tensor([[-1.0, 2.0, -1.0]]).double(), torch.tensor([[0.5, -3.0, -1.0]]).double()]
    assert live_units(Given(3, Softsign()), batches, "sum_le")["a"].tolist() == [True, True, False]
    assert live_units(Given(3, Softsign()), [torch.cat(batches)], "sum_le")["a"].tolist() == [False, False, False]


@pytest.mark.parametrize("tau", [0.0, 0.25, 1.0])
def test_tau_is_a_threshold_that_itself_is_dead(tau):
    x = torch.tensor([[0.0, 0.25, 0.5, 1.0, 2.0]], dtype=torch.float64)
    for criterion in ("auto", "ever_active", "abs_max"):
        assert live_units(Given(5, nn.ReLU()), [x], criterion, tau)["a"].tolist() == (x[0] > tau).tolist()


def test_gelu_is_judged_by_its_size_relu_by_its_sign():
    x = torch.tensor([[-1.0, -60.0, 1.0]], dtype=torch.float64)
    assert live_units(Given(3, nn.GELU()), [x])["a"].tolist() == [True, False, True]
    assert live_units(Given(3, nn.GELU()), [x], "ever_active")["a"].tolist() == [False, False, True]
    assert trace(Given(3, nn.GELU()), x).layers["a"].criterion == "abs_max"
    assert trace(Given(3, nn.ReLU6()), x).layers["a"].criterion == "ever_active"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("criterion", ["auto", "abs_max", "sum_le", "dormant", "saturation"])
def test_numbers_that_are_not_finite_name_their_layer(criterion, bad):
    model, x = build("cnn")
    structure = trace(model, x)
    with torch.no_grad():
        model[4].bias[3] = bad
    held = snapshot(model)
    with pytest.raises(RuntimeError, match=r"^4: the activation of unit 3 is not finite in batch 0 of the window"):
        observe(model, structure, [x], 4, criterion)
    with pytest.raises(RuntimeError, match=r"^4: the activation of unit 3"):
        live_units(model, [x], criterion)
    assert same(held, snapshot(model))


def test_bad_arguments_are_named():
    model, x = mlp(), rows()
    held = snapshot(model)
    with pytest.raises(ValueError, match=r"criterion='often': must be one of 'auto', 'ever_active'"):
        live_units(model, [x], "often")
    with pytest.raises(ValueError, match=r"tau=-1"):
        live_units(model, [x], tau=-1)
    with pytest.raises(ValueError, match=r"tau=nan"):
        live_units(model, [x], tau=math.nan)
    with pytest.raises(TypeError, match=r"tau='0'"):
        live_units(model, [x], tau="0")
    with pytest.raises(TypeError, match=r"batches=Tensor: .* \[x\]"):
        live_units(model, x)
    with pytest.raises(TypeError, match="batches=int"):
        live_units(model, 3)
    with pytest.raises(TypeError, match="model=str"):
        live_units("model", [x])
    with pytest.raises(RuntimeError, match=r"batch 1 of the window \(float32 \(2, 9\)\)"):
        live_units(model, [x, torch.zeros(2, 9)])
    assert same(held, snapshot(model))


@pytest.mark.parametrize("name", MODELS)
def test_after_cuts_down_to_one_unit_windows_go_on(name):
    model, x = build(name, 1)
    structure = trace(model, x)
    names = list(structure.layers)
    keep = align_and_keep(structure, {n: torch.zeros(structure.layers[n].units, dtype=torch.bool) for n in names})
    kill(model, structure, keep)
    cut(model, structure, keep, inputs=[x])
    window = observe(model, structure, [x], 1)
    assert list(window.live) == names
    assert {n: len(m) for n, m in window.live.items()} == {n: int(k.sum()) for n, k in keep.items()}
    assert all(layer.refused == "" for layer in structure.layers.values())
    again = align_and_keep(structure, window.live, window.mean)
    assert cut(model, structure, again, inputs=[x]).max_difference < 1e-10
