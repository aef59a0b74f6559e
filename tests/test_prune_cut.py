"""The physical cut: outputs, optimizer state, module attributes, copies; and the way back when it fails."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from prune_models import MODELS, build, cnn, kill, mlp, outputs, random_masks, rows, same, snapshot
from torch import nn
from torch.optim.swa_utils import AveragedModel

import torsion
from torsion.prune import compact, live_units
from torsion.prune._cut import TOLERANCE, cut
from torsion.prune._keep import align_and_keep
from torsion.prune._structure import trace

GOLDEN = {c["id"]: c for c in json.loads((Path(__file__).parent / "golden" / "demp.json").read_text())["cases"]}
EXACT = TOLERANCE[torch.float64]


def planted(name, seed, live=0.5):
    """A model in which the units outside the masks are dead, its inputs, its structure, the masks."""
    model, x = build(name, seed)
    structure = trace(model, x)
    keep = align_and_keep(structure, random_masks(structure, seed, live))
    kill(model, structure, keep)
    return model, x, structure, keep


def close(a, b):
    assert torch.isfinite(a).all()
    assert (a - b).abs().max() <= EXACT * max(1, a.abs().max())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MODELS)
def test_a_cut_of_dead_units_changes_no_output(name, seed):
    model, x, _, keep = planted(name, seed)
    before = outputs(model, x)
    elements = sum(p.numel() for p in model.parameters())
    report = compact(model, keep, x)
    close(before, outputs(model, x))
    assert {n: int(k.sum()) for n, k in keep.items()} == {n: r.live for n, r in report.layers.items()}
    assert all(r.before == r.live + r.cut for r in report.layers.values())
    assert report.parameters_before == elements
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert (report.parameters_after < elements) == any(r.cut for r in report.layers.values())
    # Traced anew the smaller model has the same layers, and it trains.
    assert {n: layer.units for n, layer in trace(model, x).layers.items()} == {
        n: r.live for n, r in report.layers.items()
    }
    model(x).sum().backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in model.parameters() if p.requires_grad)


@given(data=st.data())
def test_cuts_one_after_the_other_are_one_cut(data):
    name = data.draw(st.sampled_from(sorted(MODELS)))
    model, x, structure, keep = planted(name, data.draw(st.integers(0, 10**6)), data.draw(st.floats(0.2, 0.9)))
    before = outputs(model, x)
    at_once = copy.deepcopy(model)
    cut(at_once, copy.deepcopy(structure), keep, inputs=[x])
    some = {n: k | (torch.rand(len(k)) < 0.5) for n, k in keep.items()}
    some = align_and_keep(structure, some)
    cut(model, structure, some, inputs=[x])
    rest = {n: k[some[n]] for n, k in keep.items()}
    cut(model, structure, align_and_keep(structure, rest), inputs=[x])
    close(before, outputs(model, x))
    for (n, p), q in zip(model.named_parameters(), at_once.parameters(), strict=True):
        assert p.shape == q.shape, n
        torch.testing.assert_close(p, q, rtol=1e-15, atol=0, msg=n)  # an RMSNorm's scale is made up in two steps
    fresh = trace(model, x)
    assert fresh.layers.keys() == structure.layers.keys()
    assert all(fresh.layers[n].units == layer.units for n, layer in structure.layers.items())
    for n, layer in structure.layers.items():
        # The scale of one unit may be one number for all of them: nothing there tells whose it is.
        assert layer.units == 1 or fresh.layers[n].rows == layer.rows


def test_golden_cut():
    case = GOLDEN["C1"]
    given_, expected = case["inputs"], case["expected"]
    double = {k: torch.tensor(v, dtype=torch.float64) for k, v in given_.items()}
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    model.load_state_dict(
        {"0.weight": double["W1"], "0.bias": double["b1"], "2.weight": double["W2"], "2.bias": double["b2"]}
    )
    live = live_units(model, [double["X"]])
    assert live["0"].tolist() == [bool(v) for v in expected["live"]]
    torch.testing.assert_close(outputs(model, double["X"]), torch.tensor(expected["output"], dtype=torch.float64))
    compact(model, live, double["X"])
    close(outputs(model, double["X"]), torch.tensor(expected["output_after_cut"], dtype=torch.float64))
    assert model[0].weight.equal(double["W1"][[0, 2]])
    assert model[2].weight.equal(double["W2"][:, [0, 2]])


def test_golden_rms_norm_over_virtual_zeros():
    """Cut to its live units an RMSNorm computes what it did over all of them."""
    case = GOLDEN["V1"]
    x = torch.tensor(case["inputs"]["x_live"], dtype=torch.float64)
    width = case["inputs"]["width"]
    model = nn.Sequential(
        nn.Linear(3, width, bias=False),
        nn.LeakyReLU(1.0),  # the identity, but an activation
        nn.RMSNorm(width, eps=case["inputs"]["eps"]),
        nn.Linear(width, 3, bias=False),
    ).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.eye(width, 3))
        model[3].weight.copy_(torch.eye(3, width))
    expected = torch.tensor(case["expected"]["rms_norm_live"], dtype=torch.float64)
    close(expected, outputs(model, x))
    compact(model, {"0": torch.arange(width) < 3}, x)
    assert model[2].normalized_shape == (3,)
    close(expected, outputs(model, x))
    assert repr(copy.deepcopy(model)) == repr(model)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
    "tam": lambda p: torsion.TAM(p, lr=0.01),
    "adatam": lambda p: torsion.AdaTAM(p, lr=0.001),
    "adatamw": lambda p: torsion.AdaTAMW(p, lr=0.001),
}


def train(model, optimizer, x, steps=2):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_optimizers_state_follows(kind):
    model, x, structure, keep = planted("residual", 1)
    optimizer = OPTIMIZERS[kind](model.named_parameters())
    train(model, optimizer, x)
    names = dict(model.named_parameters())
    before = {n: dict(optimizer.state[p]) for n, p in names.items()}
    shapes = {n: p.shape for n, p in names.items()}
    values = {n: p.detach().clone() for n, p in names.items()}
    report = cut(model, structure, keep, optimizer=optimizer)
    assert any(report.kept[n] for n in names)
    for n, p in model.named_parameters():
        assert any(p is q for g in optimizer.param_groups for q in g["params"]), n
        assert p.grad is None
        state = optimizer.state[p]
        assert state.keys() == before[n].keys()
        for key, value in state.items():
            old = before[n][key]
            if isinstance(value, torch.Tensor) and old.shape == shapes[n] and old.dim():
                for axis, kept in report.kept.get(n, {}).items():
                    old = old.index_select(axis, kept)
                assert torch.equal(value, old), (n, key)
            else:
                assert value is old, (n, key)
        old = values[n]
        for axis, kept in report.kept.get(n, {}).items():
            old = old.index_select(axis, kept)
        assert torch.equal(p, old)
    assert len(optimizer.state) == len(names)
    train(model, optimizer, x)
    optimizer.load_state_dict(optimizer.state_dict())


def test_state_of_a_grouped_convolution_follows_group_by_group():
    model, x, structure, keep = planted("grouped", 3)
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, x)
    # A moment that says where it came from.
    weight = model.conv2.weight
    marks = torch.arange(weight.numel(), dtype=torch.float64).view_as(weight)
    optimizer.state[weight]["exp_avg"] = marks
    keep["conv1"] = torch.tensor([1, 0, 0, 1, 0, 1, 1, 0]).bool()
    report = cut(model, structure, align_and_keep(structure, keep), optimizer=optimizer)
    assert report.kept["conv2.weight"][1].tolist() == [[0, 3], [1, 2]]
    kept_rows = report.kept["conv2.weight"].get(0, torch.arange(12)).tolist()
    expected = torch.stack([marks[r][[[0, 3], [1, 2]][r // 6]] for r in kept_rows])
    assert torch.equal(optimizer.state[model.conv2.weight]["exp_avg"], expected)


def test_attributes_copies_and_checkpoints():
    model, x, structure, keep = planted("mobile", 2, live=0.2)
    ema = AveragedModel(model)
    twin = copy.deepcopy(model)
    cut(model, structure, keep, also=[ema, twin], inputs=[x])
    width = model.expand.weight.shape[0]
    assert width < 8
    assert (model.expand.out_channels, model.bn1.num_features, model.project.in_channels) == (width,) * 3
    assert (model.depthwise.in_channels, model.depthwise.out_channels, model.depthwise.groups) == (width,) * 3
    assert f"groups={width}" in repr(model)
    for other in (ema.module, twin, copy.deepcopy(model)):
        assert repr(other) == repr(model)
        close(outputs(model, x), outputs(other, x))
        other.load_state_dict(model.state_dict())
    assert ema.n_averaged == 0
    ema.update_parameters(model)


def test_attributes_of_every_norm():
    model, x, structure, keep = planted("groups", 0)
    keep["conv1"] = torch.tensor([1, 1, 0, 0, 1, 1, 0, 0]).bool()
    keep["conv2"] = torch.arange(6) < 2
    keep["conv3"] = torch.arange(6) > 1
    kill(model, structure, keep)
    cut(model, structure, keep, inputs=[x])
    assert (model.norm1.num_groups, model.norm1.num_channels) == (2, 4)
    assert model.norm2.num_features == 2
    assert (model.norm3.num_groups, model.norm3.num_channels) == (4, 4)
    model, x, structure, keep = planted("rms", 0)
    cut(model, structure, keep, inputs=[x])
    assert model.norm.normalized_shape == (int(keep["first"].sum()),)
    model, x, structure, keep = planted("up", 2)
    cut(model, structure, keep, inputs=[x])
    assert model.act1.num_parameters == model.up1.out_channels == model.up2.groups == int(keep["up1"].sum())


def test_num_batches_tracked_memory_format_and_tags_are_kept():
    model = cnn().double().to(memory_format=torch.channels_last)
    model[1].num_batches_tracked += 7
    tracked = model[1].num_batches_tracked
    model[4].weight.tag = "mine"
    model[4].bias.requires_grad_(False)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    structure = trace(model, x)
    cut(model, structure, {"0": torch.arange(6) < 4, "4": torch.arange(8) < 3}, inputs=[x], check=False)
    assert model[1].num_batches_tracked is tracked
    assert model[4].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[4].weight.is_contiguous()
    assert model[4].weight.tag == "mine"
    assert not model[4].bias.requires_grad


def test_half_precision_cut_is_a_slice():
    model = mlp().bfloat16()
    x = rows().bfloat16()
    with torch.no_grad():
        model[0].bias[3:] = -1000
    before = outputs(model, x)
    report = compact(model, live_units(model, [x]), x)
    assert report.layers["0"].live <= 3
    assert torch.equal(before, outputs(model, x)) or report.max_difference < 5e-2


def test_nothing_to_cut_changes_nothing():
    model, x = build("cnn")
    optimizer = torch.optim.Adam(model.parameters())
    train(model, optimizer, x)
    before = snapshot(model, optimizer)
    report = compact(model, {"4": torch.ones(8, dtype=torch.bool)}, x, optimizer)
    assert same(before, snapshot(model, optimizer))
    assert report.parameters_before == report.parameters_after
    assert report.max_difference == 0


def test_whole_dead_layer_keeps_its_first_unit_and_align_rounds_up():
    for align, expected in ((1, [0]), (3, [0, 1, 2]), (100, list(range(8)))):
        model, x = build("mlp")
        structure = trace(model, x)
        keep = align_and_keep(structure, {"0": torch.zeros(8, dtype=torch.bool)}, None, 1, align)
        assert keep["0"].nonzero().flatten().tolist() == expected
        assert keep["2"].all()
        kill(model, structure, keep)
        report = compact(model, {"0": keep["0"] & (torch.arange(8) == 0)}, x, align=align)
        assert report.layers["0"].live == len(expected)


def test_dead_units_are_kept_by_mean_then_index():
    model, x = build("mlp")
    structure = trace(model, x)
    live = {"0": torch.tensor([0, 0, 0, 1, 0, 0, 0, 0]).bool(), "2": torch.zeros(7, dtype=torch.bool)}
    mean = {"0": torch.tensor([0, 0, 0.5, 0.25, 0, 0.5, 0, 0]), "2": torch.zeros(7)}
    keep = align_and_keep(structure, live, mean, 1, 3)
    assert keep["0"].nonzero().flatten().tolist() == [2, 3, 5]
    assert keep["2"].nonzero().flatten().tolist() == [0, 1, 2]


def test_the_report_reads_well():
    model, x, structure, keep = planted("residual", 1)
    report = cut(model, structure, keep, inputs=[x])
    text = str(report)
    assert all(name in text for name in report.layers)
    assert f"{report.parameters_after:,}" in text
    assert "largest difference" in text


# The way back.


def live_network(name="residual"):
    """Nothing in it is dead, so that any cut changes its outputs."""
    model, x = build(name, 5)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    train(model, optimizer, x)
    model(x).sum().backward()
    return model, x, optimizer, trace(model, x)


def test_a_cut_that_changes_the_outputs_is_undone_bit_for_bit():
    model, x, optimizer, structure = live_network()
    ema = copy.deepcopy(model)
    layers = {n: layer.units for n, layer in structure.layers.items()}
    held, held_ema, expected = snapshot(model, optimizer), snapshot(ema), outputs(model, x)
    keep = align_and_keep(structure, random_masks(structure, 0))
    with pytest.raises(
        RuntimeError, match=r"the cut changes an output of float64 \(4, 3, 8, 8\) by .* Nothing was cut"
    ):
        cut(model, structure, keep, optimizer=optimizer, also=[ema], inputs=[x])
    with pytest.raises(RuntimeError, match="Nothing was cut"):
        compact(model, keep, x, optimizer, also=ema)
    assert same(held, snapshot(model, optimizer))
    assert same(held_ema, snapshot(ema))
    assert torch.equal(outputs(model, x), expected)
    assert layers == {n: layer.units for n, layer in structure.layers.items()}
    train(model, optimizer, x)
    # Where only the report matters the same cut is made.
    report = cut(model, structure, keep, optimizer=optimizer, also=[ema], inputs=[x], check=False)
    assert report.max_difference > 1e-3


def test_a_difference_is_measured_against_the_tolerance_of_the_dtype():
    torch.manual_seed(0)
    model, x = mlp(), rows()
    with torch.no_grad():
        model[0].weight[0] = 0
        model[0].bias[0] = 5e-5
        model[2].weight.clamp_(-0.5, 0.5)
    structure = trace(model, x)
    keep = {"0": torch.arange(8) > 0}
    for tolerance in ({torch.float32: 1e-7}, {}):
        with pytest.raises(RuntimeError, match="Nothing was cut"):
            cut(model, structure, keep, inputs=[x], tolerance=tolerance)
    assert 0 < cut(model, structure, keep, inputs=[x]).max_difference < 1e-4


@pytest.mark.parametrize("act", [0.0, 1e-5], ids=["dead", "all but dead"])
def test_a_difference_is_measured_against_the_largest_output(act):
    """Rounding grows with the outputs; units that act by 1e-5 stand for it, whatever the order of sums."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(5, 64), nn.ReLU(), nn.Linear(64, 3)), rows()
    with torch.no_grad():
        model[0].weight[:2], model[0].bias[:2] = 0, act
        model[2].weight.mul_(1e4)
    largest = float(outputs(model, x).abs().max())
    report = cut(model, trace(model, x), {"0": torch.arange(64) > 1}, inputs=[x])
    assert report.layers["0"].cut == 2
    assert report.max_difference < TOLERANCE[torch.float32] * largest
    assert act == 0 or report.max_difference > TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    ("dtype", "allowed", "refused"),
    [
        (torch.float64, 5e-11, 2e-10),
        (torch.float32, 5e-5, 2e-4),
        (torch.bfloat16, 1e-2, 0.1),
        (torch.float16, 1e-2, 0.1),
    ],
    ids=str,
)
def test_what_a_cut_may_change_in_each_dtype(dtype, allowed, refused):
    """All outputs are those of one unit, a constant, and nothing without it."""
    model, x = mlp().to(dtype), rows().to(dtype)
    structure, keep = trace(model, x), {"2": torch.arange(7) > 0}
    with torch.no_grad():
        model[2].weight[0], model[2].bias[0] = 0, refused
        model[4].weight.zero_()[:, 0] = 1
        model[4].bias.zero_()
    held = snapshot(model)
    with pytest.raises(RuntimeError, match=r"the cut changes an output .* Nothing was cut"):
        cut(model, structure, keep, inputs=[x])
    assert same(held, snapshot(model))
    with torch.no_grad():
        model[2].bias[0] = allowed
    change = model[2].bias[0].item()
    assert cut(model, structure, keep, inputs=[x]).max_difference == change


def test_a_model_that_fails_with_fewer_units_is_as_before():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x):
            y = self.a(x).relu()
            if len(x) == 2 and y.shape[1] != 8:
                raise ValueError("eight, please")
            return self.b(y)

    model = Counting()
    x = rows()
    structure = trace(model, x)
    held = snapshot(model)
    with pytest.raises(RuntimeError, match=r"does not run on float32 \(2, 5\) \(ValueError: eight, please\)"):
        cut(model, structure, {"a": torch.arange(8) > 0}, inputs=[x[:2]])
    assert same(held, snapshot(model))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: torch.optim.Adafactor(p), r"Adafactor keeps 'row_var' of shape \(6, 3, 3, 1\)|Adafactor keeps"),
        (lambda p: torch.optim.LBFGS(p, max_iter=3), "LBFGS: its state '.*' is a list of tensors"),
    ],
    ids=["adafactor", "lbfgs"],
)
def test_state_that_cannot_follow_is_refused(make, message):
    model, x, structure, keep = planted("residual", 1)
    optimizer = make(model.parameters())

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    held = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message):
        cut(model, structure, keep, optimizer=optimizer)
    assert same(held, snapshot(model, optimizer))


def test_copies_that_cannot_follow_are_refused():
    model, x, structure, keep = planted("cnn", 1)
    narrow, other = cnn().double(), nn.Linear(3, 3)
    narrow[4] = nn.Conv2d(6, 7, 3)
    held = snapshot(model)
    for copy_, message in (
        (other, r"also\[0\]: has no "),
        (narrow, r"also\[0\]\.4\.weight: shape \(7, 6, 3, 3\), but \(8, 6, 3, 3\)"),
        (model, r"also\[0\]\..*: is the model's own"),
    ):
        with pytest.raises(ValueError, match=message):
            cut(model, structure, keep, also=[copy_], inputs=[x])
    assert same(held, snapshot(model))


def test_unequal_groups_and_empty_layers_are_refused():
    model, x = build("grouped")
    structure = trace(model, x)
    held = snapshot(model)
    with pytest.raises(ValueError, match=r"the 2 groups of 'conv2' would be left with \[3, 4\] of 4 channels"):
        cut(model, structure, {"conv1": torch.arange(8) > 0})
    with pytest.raises(ValueError, match="conv1: no unit would be left"):
        cut(model, structure, {"conv1": torch.zeros(8, dtype=torch.bool)})
    assert same(held, snapshot(model))


def test_a_whole_group_of_a_norm_goes_and_a_part_is_kept_with_it():
    model, x = build("groups")
    structure = trace(model, x)
    live = {"conv1": torch.tensor([1, 1, 0, 0, 0, 1, 1, 1]).bool()}
    assert align_and_keep(structure, live)["conv1"].tolist() == [True, True, False, False, True, True, True, True]


def test_not_finite_outputs_are_compared_as_they_are():
    model, x, structure, keep = planted("mlp", 0)
    with torch.no_grad():
        model[4].bias[0] = float("inf")
        model[4].bias[1] = float("nan")
    assert cut(model, structure, keep, inputs=[x]).max_difference < EXACT
