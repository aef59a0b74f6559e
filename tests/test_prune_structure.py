"""What tracing finds, what it refuses by name, and that a refusal leaves everything as it was."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from prune_models import MODELS, Attention, build, cnn, mlp, outputs, rows, same, snapshot, tokens
from torch import nn

from torsion.prune import compact, live_units
from torsion.prune._cut import cut
from torsion.prune._follow import Follower
from torsion.prune._keep import align_and_keep
from torsion.prune._structure import trace

FALSE8 = torch.arange(8) % 2 > 0


@pytest.fixture(autouse=True)
def strict(monkeypatch):
    """What a handler stumbles over is a bug here, no refusal."""
    monkeypatch.setattr(Follower, "strict", True)


class Between(nn.Module):
    """Linear "a", then ``f(self, x)``, then Linear "b"."""

    def __init__(self, f, width=8, reads=8, **modules):
        super().__init__()
        self.a, self.b = nn.Linear(5, width), nn.Linear(reads, 3)
        self.f = f
        for name, module in modules.items():
            setattr(self, name, module)
        self.double()

    def forward(self, x):
        return self.b(self.f(self, self.a(x)))


def buffered(f):
    model = Between(f)
    model.register_buffer("scale", torch.randn(8, dtype=torch.float64))
    return model


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * torch.sigmoid(x)


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clamp(min=0)


def shift_through_a_view(self, x):
    y = F.relu(x)
    y[:, :4].add_(1.0)
    return y


def write_into(self, x):
    y = F.relu(x)
    y[:, 0] = 1.0
    return y


def before(self, x):
    return F.relu(self.n(x))


def after(self, x):
    return self.n(F.relu(x))


STATISTICS = "takes its statistics over all"
FIXED = "depends on a fixed number of channels"
LOST = "cannot be followed"
RAW = "'b' reads it without an activation"

# Name -> what lies between the layers, what is said about it, the module "n" if there is one.
REFUSED = {
    "batchnorm_after": (after, "batch_norm in 'n' maps the zeros", lambda: nn.BatchNorm1d(8)),
    "layernorm_before": (before, f"layer_norm in 'n' {STATISTICS}", lambda: nn.LayerNorm(8)),
    "layernorm_after": (after, f"layer_norm in 'n' {STATISTICS}", lambda: nn.LayerNorm(8)),
    "rmsnorm_before": (before, f"rms_norm in 'n' {STATISTICS}", lambda: nn.RMSNorm(8)),
    "rmsnorm_without_scale": (after, "rms_norm in 'n' .* no scale", lambda: nn.RMSNorm(8, elementwise_affine=False)),
    "groupnorm_after": (after, "group_norm in 'n' maps the zeros", lambda: nn.GroupNorm(4, 8)),
    "groupnorm_of_one_group": (before, f"group_norm in 'n' {STATISTICS}", lambda: nn.GroupNorm(1, 8)),
    "groupnorm_in_part": (before, r"group_norm in 'n': \[2, 2\] of 4 .*whole groups", lambda: nn.GroupNorm(2, 8)),
    "add_a_number": (lambda s, x: F.relu(x) + 1, "add in the model's own forward maps the zeros"),
    "exp": (lambda s, x: F.relu(x).exp(), "exp in .* maps the zeros"),
    "pad_with_a_number": (lambda s, x: F.pad(F.relu(x)[..., None], (1, 1), value=2.0).sum(-1), "pad in .* maps the"),
    "fixed_view": (lambda s, x: F.relu(x).view(16, 8), f"view in .* {FIXED}"),
    "fixed_view_of_rows": (lambda s, x: F.relu(x).view(-1, 8), f"view in .* {FIXED}"),
    "fixed_slice": (lambda s, x: torch.cat([F.relu(x)[:, :4]] * 2, 1), f"getitem in .* {FIXED}"),
    "fixed_split": (lambda s, x: torch.cat(F.relu(x).split([2, 6], 1)[::-1], 1), f"split in .* {FIXED}"),
    "unflatten": (lambda s, x: s.n(F.relu(x)).flatten(1), f"unflatten in 'n' {FIXED}", lambda: nn.Unflatten(1, (2, 4))),
    "unknown_operation": (lambda s, x: F.relu(x).cumsum(1), f"cumsum in .* {LOST}"),
    "unknown_activation": (lambda s, x: torch.special.erfcx(x), f"erfcx in .* {LOST}"),
    "mean_over_units": (lambda s, x: F.relu(x).mean(1, keepdim=True).expand(-1, 8), f"mean in .* {LOST}"),
    "softmax": (lambda s, x: F.softmax(x, -1), "softmax in .* attention"),
    "recurrent": (
        lambda s, x: s.n(F.relu(x)[:, None])[0][:, 0], f"lstm in 'n' {LOST}", lambda: nn.LSTM(8, 8, batch_first=True)
    ),
    "weight_norm": (
        after, "'n' has a weight that is computed", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
    ),
    "numpy": (lambda s, x: torch.from_numpy(F.relu(x).detach().numpy()), f"numpy in .* {LOST}"),
    "changed_through_a_view": (shift_through_a_view, "through a view"),
    "written_into": (write_into, f"setitem in .* {LOST}"),
    "parameter_matmul": (
        lambda s, x: F.relu(x) @ s.n, f"matmul in .* {LOST}", lambda: nn.Parameter(torch.randn(8, 8).double())
    ),
    "constant": (lambda s, x: F.relu(x) * torch.arange(8.0), "mul in .* cannot be cut"),
    "no_activation": (lambda s, x: x * 2, RAW),
    "raw_beside_activated": (lambda s, x: F.relu(x) + x, RAW),
    "weight_read_elsewhere": (lambda s, x: F.relu(x) * s.a.weight.norm(), "'a.weight' is also read by norm"),
    "thrown_away": (lambda s, x: (F.relu(x), F.relu(x) * 2)[0], "no operation that can be followed"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_cut_that_would_change_the_function_is_refused_by_name(case):
    f, message, *make = REFUSED[case]
    torch.manual_seed(0)
    model = Between(f, **({"n": make[0]()} if make else {}))
    optimizer = torch.optim.Adam(model.parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    held = snapshot(model, optimizer)
    with pytest.raises(ValueError, match=message) as error:
        compact(model, {"a": FALSE8}, rows().double(), optimizer)
    assert str(error.value).startswith("group_norm" if case == "groupnorm_in_part" else "a: c")
    assert same(held, snapshot(model, optimizer))


ALLOWED = {
    "number_times": lambda s, x: F.relu(x) * 2 / 3,
    "square": lambda s, x: F.relu(x) ** 2,
    "view_of_batch": lambda s, x: F.relu(x).view(x.size(0), -1),
    "dropout": lambda s, x: F.dropout(F.relu(x), training=s.training),
    "sum_over_units": lambda s, x: F.relu(x).sum(1, keepdim=True).expand(-1, 8),
    "gelu_by_hand": lambda s, x: 0.5 * x * (1 + torch.tanh(0.79 * (x + 0.044 * x**3))),
    "hardswish_by_hand": lambda s, x: x * F.relu6(x + 3) / 6,
    "custom_function": lambda s, x: Swish.apply(x),
    "custom_relu": lambda s, x: Clipped.apply(x),
    "checkpointed": lambda s, x: torch.utils.checkpoint.checkpoint(F.relu, x, use_reentrant=False),
    "aten": lambda s, x: torch.ops.aten.relu(x),
    "in_place": lambda s, x: x.relu_().mul_(2.0),
    "cast": lambda s, x: F.relu(x).float().to(x.dtype),
    "activation_of_a_view": lambda s, x: F.relu(x.t()).t(),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_keeps_zeros_is_followed(case):
    torch.manual_seed(0)
    model = Between(ALLOWED[case], reads=8)
    if case == "sum_over_units":
        model.b = nn.Linear(8, 3).double()
    x = rows().double()
    with torch.no_grad():
        model.a.weight[~FALSE8] = 0
        model.a.bias[~FALSE8] = 0
    before = outputs(model, x)
    live = live_units(model, [x])
    assert torch.equal(live["a"], FALSE8)
    report = (compact if case != "sum_over_units" else _fails)(model, live, x)
    if report is not None:
        torch.testing.assert_close(outputs(model, x), before, rtol=1e-12, atol=1e-12)
        assert model.b.in_features == 4


def _fails(model, live, x):
    """The sum of fewer units is the same, but here it is spread over as many again: the reader stays."""
    compact(model, live, x)
    assert model.a.out_features == 4
    assert model.b.in_features == 8


@pytest.mark.parametrize("what", ["parameter", "buffer"])
def test_parameters_and_buffers_along_channels_are_cut_too(what):
    model = buffered(lambda s, x: F.relu(x * s.scale))
    if what == "parameter":
        scale = model.scale
        del model.scale
        model.scale = nn.Parameter(scale)
    x = rows().double()
    with torch.no_grad():
        model.a.weight[~FALSE8] = 0
        model.a.bias[~FALSE8] = 0
    before, scale = outputs(model, x), model.scale
    report = compact(model, {"a": FALSE8}, x)
    torch.testing.assert_close(outputs(model, x), before)
    assert torch.equal(model.scale, scale[FALSE8])
    assert report.kept["scale"][0].tolist() == [1, 3, 5, 7]
    assert ("scale" in trace(model, x).layers["a"].rows) == (what == "parameter")


EXPECTED = {
    "residual": ["stem", "conv1", "conv2", "conv3", "conv4", "project"],
    "gated": ["first", "second", "gate"],
    "attention": ["fc1"],
    "encoder": ["1.linear1"],
    "mobile": ["expand", "depthwise", "squeeze", "excite"],
    "shared": ["first", "again"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_layers_are_those_that_an_activation_follows(name):
    model, x = build(name)
    structure = trace(model, x)
    assert list(structure.layers) == EXPECTED[name]
    linear = (nn.Linear, nn.modules.conv._ConvNd)
    makers = {n for n, m in model.named_modules() if isinstance(m, linear) and "self_attn" not in n}
    assert makers == structure.layers.keys() | structure.protected.keys()
    assert list(live_units(model, [x])) == EXPECTED[name]


def test_ties_rows_and_criteria():
    layers = trace(*build("residual")).layers
    assert layers["stem"].group == layers["conv2"].group != layers["conv1"].group
    assert layers["conv4"].group == layers["project"].group
    assert layers["conv1"].rows == {"conv1.weight": 0, "bn1.weight": 0, "bn1.bias": 0}
    assert {layer.criterion for layer in layers.values()} == {"ever_active"}
    layers = trace(*build("up")).layers
    assert layers["up1"].rows == {"up1.weight": 1, "up1.bias": 0, "act1.weight": 0}
    assert layers["up1"].criterion == "abs_max"
    assert layers["fc1"].criterion == "ever_active"


def test_rows_of_norms_over_several_layers():
    structure = trace(*build("dense"))
    live = {n: torch.ones(layer.units, dtype=torch.bool) for n, layer in structure.layers.items()}
    live["conv1"][1] = False
    masks = structure.row_masks(live)
    assert masks["bn2.weight"][0] == 0
    assert masks["bn2.weight"][1].tolist() == [True] * 5 + [False, True]
    assert masks["conv1.weight"][1].tolist() == [True, False, True]
    assert "fc.weight" not in {n for n, (_, mask) in masks.items() if mask.any()}
    del live["stem"]
    assert structure.row_masks(live)["bn2.weight"][1].tolist() == [False] * 4 + [True, False, True]


def test_tied_embedding_stream_heads_and_logits_are_protected():
    model = Attention().double()
    structure = trace(model, tokens())
    assert {"qkv", "out", "fc2", "head"} == structure.protected.keys()
    before = snapshot(model)
    for name in structure.protected:
        width = model.get_submodule(name).out_features
        with pytest.raises(ValueError, match=rf"^{name}: cannot be cut: "):
            compact(model, {name: torch.arange(width) > 0}, tokens())
        compact(model, {name: torch.ones(width, dtype=torch.bool)}, tokens())
    assert same(before, snapshot(model))
    assert model.head.weight is model.embed.weight


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_the_encoder_layers_fused_path_hides_nothing(activation, norm_first):
    layer = nn.TransformerEncoderLayer(8, 2, 12, activation=activation, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).double()
    x = torch.randn(3, 4, 8, dtype=torch.float64)
    dead = torch.arange(12) % 3 == 0
    with torch.no_grad():
        for each in model.layers:
            each.linear1.weight[dead] = 0
            each.linear1.bias[dead] = 0
    before = outputs(model, x)
    live = live_units(model, [x])
    assert list(live) == ["layers.0.linear1", "layers.1.linear1"]
    assert all(torch.equal(mask, ~dead) for mask in live.values())
    compact(model, live, x)
    assert model.layers[1].linear2.in_features == 8
    torch.testing.assert_close(outputs(model, x), before)
    assert torch.backends.mha.get_fastpath_enabled()


class Reshaped(nn.Module):
    """A decoder's view with sizes of its own, which pass, and a view by a remembered number, which does not."""

    def __init__(self, remembered):
        super().__init__()
        self.fc, self.conv = nn.Linear(5, 24), nn.Conv2d(6, 3, 1)
        self.remembered = remembered

    def forward(self, x):
        x = F.relu(self.fc(x))
        x = x.view(len(x), 6, 2, 2) if self.remembered else x.view(len(x), -1, 2, 2)
        return self.conv(x).mean((2, 3))


def test_units_that_become_channels_and_pixels():
    x = rows().double()
    model = Reshaped(remembered=True).double()
    assert "view in" in trace(model, x).layers["fc"].refused
    model = Reshaped(remembered=False).double()
    structure = trace(model, x)
    assert structure.layers["fc"].refused == ""
    keep = align_and_keep(structure, {"fc": torch.arange(24) > 5})
    assert keep["fc"].tolist() == [False] * 4 + [True] * 20  # units 4 to 7 are the pixels of one channel
    with torch.no_grad():
        model.fc.weight[:4] = 0
        model.fc.bias[:4] = 0
    before = outputs(model, x)
    cut(model, structure, keep, inputs=[x])
    assert model.conv.in_channels == 5
    torch.testing.assert_close(outputs(model, x), before)


@pytest.mark.parametrize("name", MODELS)
def test_tracing_changes_nothing(name):
    model, x = build(name)
    for i, m in enumerate(model.modules()):
        m.training = i % 2 == 0
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = snapshot(model, optimizer)
    trace(model, x)
    live_units(model, [x])
    assert same(before, snapshot(model, optimizer))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())


def test_a_model_that_draws_numbers_and_counts_calls_is_as_before():
    class Restless(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.b(F.relu(self.a(x)) * (1 + 0 * torch.rand(())))

    model = Restless()
    before = snapshot(model)
    trace(model, rows())
    assert same(before, snapshot(model))


def test_inputs_of_several_forms():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

        def forward(self, x, y, scale=1.0):
            return {"logits": [self.c(F.relu(self.a(x)) + F.relu(self.b(y)) * scale)]}

    x = rows()
    for inputs in ((x, x), [x, x], (x, x, 2.0), {"x": x, "y": x}):
        structure = trace(Two(), inputs)
        assert structure.layers["a"].group == structure.layers["b"].group
        assert "reaches the model's output" in structure.protected["c"]


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_errors_name_what_failed():
    model, scripted = mlp(), torch.jit.script(mlp())
    lazy = nn.Sequential(nn.LazyLinear(8))
    held = snapshot(model)
    with pytest.raises(
        RuntimeError, match=r"example_inputs \(float32 \(2, 9\)\): Sequential does not run.*mat1 and mat2"
    ):
        trace(model, torch.zeros(2, 9))
    with pytest.raises(RuntimeError, match="example_inputs"):
        compact(model, {}, "nonsense")
    with pytest.raises(TypeError, match="model=int"):
        trace(3, torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"'nope': no Linear or convolution of this name.*0, 2"):
        compact(model, {"nope": FALSE8}, rows())
    with pytest.raises(ValueError, match=r"^0: the mask has shape \(3,\), but the layer has 8 units"):
        compact(model, {"0": torch.ones(3, dtype=torch.bool)}, rows())
    with pytest.raises(TypeError, match=r"^0: the mask is torch.float32"):
        compact(model, {"0": torch.ones(8)}, rows())
    with pytest.raises(ValueError, match="align=0"):
        compact(model, {}, rows(), align=0)
    with pytest.raises(TypeError, match=r"align=1\.5"):
        compact(model, {}, rows(), align=1.5)
    with pytest.raises(TypeError, match=r"also\[0\]=int"):
        compact(model, {}, rows(), also=[3])
    with pytest.raises(TypeError, match="optimizer=str"):
        compact(model, {}, rows(), "adam")
    with pytest.raises(ValueError, match=r"0\.weight: is not initialized"):
        trace(lazy, rows())
    with pytest.raises(ValueError, match="TorchScript"):
        trace(scripted, rows())
    assert same(held, snapshot(model))


def test_sharded_models_are_refused_by_name():
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = mlp()
        mesh = dist.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        for run in (
            lambda: trace(model, rows()),
            lambda: compact(model, {}, rows()),
            lambda: live_units(model, [rows()]),
        ):
            with pytest.raises(ValueError, match="FSDP"):
                run()
    finally:
        dist.destroy_process_group()


def test_the_wrapper_of_a_distributed_model_is_refused():
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(mlp())
        with pytest.raises(ValueError, match=r"pass model\.module"):
            compact(model, {"0": FALSE8}, rows())
        assert list(live_units(model, [rows()])) == ["0", "2"]
    finally:
        dist.destroy_process_group()


def test_a_structure_of_another_size_is_told():
    model, x = build("cnn")
    structure = trace(model, x)
    other = copy.deepcopy(structure)
    cut(model, structure, {"0": torch.arange(6) > 0}, check=False)
    from torsion.prune._window import observe

    with pytest.raises(RuntimeError, match="0: has 5 units, but had 6 when it was traced"):
        observe(model, other, [x], 1)
    observe(model, structure, [x], 1)


def test_one_activation_module_for_all_and_names_in_messages():
    model = cnn()
    model[2] = model[5] = nn.ReLU()
    assert list(trace(model, torch.randn(2, 3, 8, 8)).layers) == ["0", "4", "8"]
