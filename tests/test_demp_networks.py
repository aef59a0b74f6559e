"""DemP on networks of every kind, and what its step does there: noise, decay, accumulation, the cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from demp_runs import INPUTS, adamw, backward, demp_of, inputs, kill, mlp, same, windows
from prune_models import MODELS, build, outputs, random_masks
from prune_models import kill as kill_by_masks
from torch import Tensor, nn

import torsion
from torsion.prune import compact, live_units, schedule
from torsion.prune._keep import align_and_keep
from torsion.prune._structure import trace


@pytest.mark.parametrize("align", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_every_network_is_cut_with_its_optimizer_and_its_copy(name: str, align: int) -> None:
    """Groups, depthwise and transposed convolutions, gates, concatenation, residuals, attention, shared layers."""
    model, x = build(name, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    ema = copy.deepcopy(model)
    demp = torsion.DemP(model, optimizer, x, total_steps=9, lasso=0.0, noise_std=1e-3, align=align, also=ema)
    model.eval()(x).square().mean().backward()
    optimizer.step()
    structure = trace(model, x)
    kill_by_masks(model, structure, align_and_keep(structure, random_masks(structure, 3, live=0.2)))
    live, before = live_units(model, [x]), outputs(model, x)
    moments = {n: optimizer.state[p]["momentum_buffer"].clone() for n, p in model.named_parameters()}
    report = demp.finish([x])
    assert sum(r.cut for r in report.layers.values()) > 0
    for layer, r in report.layers.items():
        assert r.live >= int(live[layer].sum())
        assert r.live == r.before or r.live % align == 0, layer
    torch.testing.assert_close(outputs(model, x), before, rtol=1e-9, atol=1e-9)
    for (n, p), q in zip(model.named_parameters(), ema.parameters(), strict=True):
        moment, kept = optimizer.state[p]["momentum_buffer"], report.kept.get(n, {})
        assert moment.shape == p.shape == q.shape
        if all(indices.dim() == 1 for indices in kept.values()):
            expected = moments[n]
            for axis, indices in kept.items():
                expected = expected.index_select(axis, indices)
            assert torch.equal(moment, expected), n
    model.train()(x).square().mean().backward()
    optimizer.step()
    assert demp.steps_taken == 2


@pytest.mark.parametrize("name", ["dense", "mobile", "up", "gated", "rms", "groups", "shuffle", "encoder"])
def test_every_network_resumes_with_the_same_bits(name: str) -> None:
    """Edge case 10: through cuts before and after the stop, from a full-size model."""

    def start() -> tuple[Any, ...]:
        model, x = build(name, 1)
        optimizer = torsion.TAM(model.parameters(), lr=0.02)
        rule = {"criterion": "dormant", "tau": 0.6, "window": 1, "prune_every": 2}
        demp = torsion.DemP(model, optimizer, x, total_steps=9, noise_std=0.02, lasso=0.05, **rule)
        return demp, model.eval(), optimizer, x

    def train(run: tuple[Any, ...], steps: int) -> None:
        demp, model, optimizer, x = run
        for _ in range(steps):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
            demp.step([x])

    first = start()
    train(first, 3)
    assert first[0].generation == 1
    saved = copy.deepcopy([part.state_dict() for part in first[:3]])
    train(first, 4)
    second = start()
    for part, state in zip(second, saved, strict=False):
        part.load_state_dict(state)
    train(second, 4)
    assert same(first[1].state_dict(), second[1].state_dict())
    assert same(first[0].state_dict(), second[0].state_dict())
    assert first[1](first[3]).equal(second[1](first[3]))


def test_attention_stream_embedding_and_logits_stay() -> None:
    """Edge cases 6 to 8: of a transformer only the hidden units of the feed-forward block are DemP's."""
    model, tokens = build("attention")
    optimizer = adamw(model)
    demp = torsion.DemP(model, optimizer, tokens, total_steps=9, lasso=0.0, noise_std=0.1)
    assert list(demp.live()) == ["fc1"]
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p.detach(), before[n])}
    assert moved == {"fc1.weight", "fc1.bias"}
    with torch.no_grad():
        model.fc1.weight[3:] = 0
        model.fc1.bias[3:] = 0
    assert demp.finish([tokens]).layers["fc1"].live == 3
    assert model.head.weight is model.embed.weight
    assert {n for n, p in model.named_parameters() if p.shape != before[n].shape} == {
        "fc1.weight", "fc1.bias", "fc2.weight"
    }  # fmt: skip


@pytest.mark.parametrize("form", ["nchw", "nhwc"])
def test_flattened_channels_take_their_columns_with_them(form: str) -> None:
    """NCHW repeats the mask for each pixel, channels in the last dimension tile it."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4 * 2 * 3, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.relu(self.conv(x))
            return self.fc((x if form == "nchw" else x.permute(0, 2, 3, 1)).flatten(1))

    torch.manual_seed(0)
    model, x = Net().double(), torch.randn(5, 3, 4, 5).double()
    with torch.no_grad():
        model.conv.weight[[0, 2]], model.conv.bias[[0, 2]] = 0.0, -1.0
    before, weight = model(x), model.fc.weight.detach().clone()
    compact(model, live_units(model, [x]), x)
    mask = torch.tensor([False, True, False, True])
    columns = mask.repeat_interleave(6) if form == "nchw" else mask.repeat(6)
    assert torch.equal(model.fc.weight, weight[:, columns])
    torch.testing.assert_close(model(x), before, rtol=1e-12, atol=1e-12)


# Noise


def moved_by_noise(model: nn.Module, x: Tensor, live: dict[str, list[int]]) -> dict[str, Tensor]:
    """Which elements a step without gradients moves, where each layer's units in ``live`` are said to be dead."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    demp = torsion.DemP(model, optimizer, x, total_steps=9, noise_std=0.1)
    saved = demp.state_dict()
    for name, units in live.items():
        saved["layers"][name]["live"][units] = False
    demp.load_state_dict(saved)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimizer.step()
    return {n: p.detach() != before[n] for n, p in model.named_parameters()}


def test_noise_reaches_a_norm_over_several_layers() -> None:
    """After a concatenation scale and shift belong to units of the layers side by side; the raw ones get none."""
    model, x = build("dense")
    layers = trace(model, x).layers
    moved = moved_by_noise(model, x, {"stem": [1, 2], "conv1": [0]})
    for name in ("bn2.weight", "bn2.bias"):
        assert moved[name].tolist() == [True, False, False, True, False, True, True]
    assert moved["bn3.weight"].tolist() == [True, False, False, True, False, True, True] + ["conv2" in layers] * 3
    assert moved["bn1.weight"].tolist() == [True, False, False, True]
    assert not moved["fc.weight"].any()


@pytest.mark.parametrize("name", MODELS)
def test_noise_is_for_the_layers_that_live_lists_and_no_others(name: str) -> None:
    """Not for logits, attention, raw streams, embeddings, or the half of a gate that no activation follows."""
    model, x = build(name)
    moved = moved_by_noise(model, x, {})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    live = torsion.DemP(model, optimizer, x, total_steps=9).live().keys()
    makers = {n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding))}
    noised = {n for n in makers if moved.get(n + ".weight", torch.zeros(1)).any()}
    assert noised == live & makers
    for n in noised:
        assert moved[n + ".weight"].all()


def test_noise_of_a_norm_over_several_layers_does_not_see_the_cut() -> None:
    runs = []
    for cuts in (False, True):
        model, x = build("dense")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        demp = torsion.DemP(model, optimizer, x, total_steps=9, noise_std=0.1, schedule="constant")
        saved = demp.state_dict()
        for name, unit in (("stem", 2), ("conv1", 1)):
            entry = saved["layers"][name]
            entry["live"][unit] = False
            if cuts:
                left = torch.arange(len(entry["kept"])) != unit
                for key in ("kept", "live", "dead_windows", "mean"):
                    entry[key] = entry[key][left]
        demp.load_state_dict(saved)
        optimizer.step()
        runs.append({n: p.detach().clone() for n, p in model.named_parameters()})
    dense, small = runs
    kept = [0, 1, 3, 4, 6]
    assert torch.equal(small["bn2.weight"], dense["bn2.weight"][kept])
    assert torch.equal(small["bn3.bias"], dense["bn3.bias"][[*kept, 7, 8, 9]])
    assert torch.equal(small["conv2.weight"], dense["conv2.weight"][:, kept])


@pytest.mark.parametrize("name", ["residual", "dense", "mobile", "grouped", "up", "shuffle"])
def test_noise_is_the_same_whoever_adds_it(name: str) -> None:
    """Inside torsion's step or after another's, whatever the layout: before a window, after it and after a cut."""
    runs = []
    for cls, layout in ((torch.optim.SGD, torch.contiguous_format), (torsion.TAM, torch.channels_last)):
        model, x = build(name, 1)
        structure = trace(model, x)
        kill_by_masks(model, structure, align_and_keep(structure, random_masks(structure, 3, live=0.2)))
        model.float()
        for p in model.parameters():
            p.data = p.data.contiguous(memory_format=layout) if p.dim() == 4 else p.data
        start = copy.deepcopy(model.state_dict())
        optimizer = cls(model.parameters(), lr=0.0)
        demp = torsion.DemP(model, optimizer, x.float(), total_steps=9, noise_std=0.1, lasso=0.0, schedule="constant")

        def step(model: nn.Module = model, optimizer: Any = optimizer) -> list[Tensor]:
            for p in model.parameters():
                p.grad = torch.zeros_like(p)
            optimizer.step()
            return [p.detach().clone().contiguous() for p in model.parameters()]

        found = step()
        model.load_state_dict(start)  # the dead are dead again
        demp.observe([x.float()])
        found += step()
        model.load_state_dict(start)
        assert any(r.cut for r in demp.finish([x.float()]).layers.values())
        runs.append(found + step())
    assert same(*runs)


# Weights that nothing else moves


def test_weight_decay_acts_on_dead_rows_and_noise_does_not() -> None:
    """Edge case 13: between windows nothing is masked but the noise."""
    model = mlp()
    optimizer = adamw(model, lr=0.1, weight_decay=0.5)
    demp = demp_of(model, optimizer, noise_std=0.1, lasso=0.0, prune_every=100)
    kill(model, 0, 3)
    demp.observe(windows())
    before = model[0].weight.detach().clone()
    for step in range(3):
        backward(model, step)
        assert not model[0].weight.grad[3].any()
        optimizer.step()
    torch.testing.assert_close(model[0].weight.detach()[3], before[3] * (1 - 0.1 * 0.5) ** 3, rtol=1e-14, atol=0)


@pytest.mark.parametrize("cls", [torch.optim.SGD, torsion.TAM], ids=lambda c: c.__name__)
def test_accumulated_gradients_get_lasso_and_noise_once(cls: Any) -> None:
    """Edge case 11: they belong to the optimizer's step, however many backward passes go before it."""
    runs = []
    for parts in (1, 4):
        model = mlp().eval()  # running statistics: batches add up
        optimizer = cls(model.parameters(), lr=0.05)
        demp = demp_of(model, optimizer, lasso=0.1, noise_std=0.1)
        for step in range(3):
            optimizer.zero_grad()
            for part in inputs(step).chunk(parts):
                held = [p.detach().clone() for p in model.parameters()]
                loss = nn.functional.cross_entropy(model(part), (part.sum(1) > 0).long()) / parts
                loss.backward()
                assert same(held, [p.detach() for p in model.parameters()])
            optimizer.step()
            assert demp.steps_taken == step + 1
        runs.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_scale_without_loss_shrinks_by_the_lasso_alone() -> None:
    """And the lasso follows the schedule: the sum of lr lambda s(t) over the steps."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    demp = demp_of(model, optimizer, lasso=0.01, noise_std=0.0, prune_every=100)
    before = model[1].weight.detach().clone()
    for _ in range(8):
        model.zero_grad()
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    s = schedule("one_cycle", 20)
    torch.testing.assert_close(
        before - model[1].weight.detach(), torch.full((8,), 0.005 * sum(map(s, range(8)))).double()
    )
    assert demp.steps_taken == 8


# Optimizers of a single cut


@pytest.mark.parametrize("cls", [torsion.Lookbehind, torsion.SAM], ids=lambda c: c.__name__)
def test_compact_takes_a_sharpness_aware_optimizer_along_between_outer_steps(cls: Any) -> None:
    model, x = mlp(), inputs()
    optimizer = cls(torch.optim.AdamW(model.parameters(), lr=0.01))

    def closure() -> Tensor:
        return backward(model, 0)

    for _ in range(2):
        kill(model, 0, 1)
        optimizer.step(closure)
    kill(model, 0, 1)
    live = live_units(model, [x])
    closure()
    optimizer.ascent_step()
    held = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match=r"compact\(\): an outer step is open, descent_step\(\) is expected"):
        compact(model, live, x, optimizer)
    assert same(held, [p.detach() for p in model.parameters()])
    optimizer.abandon()
    assert compact(model, live, x, optimizer).layers["0"].cut == 1
    weight = model[0].weight.detach().clone()
    optimizer.step(closure)
    assert (model[0].weight.detach() != weight).any()
    for p in model.parameters():
        assert optimizer.base_optimizer.state[p]["exp_avg"].shape == p.shape


def test_an_optimizer_that_shards_its_state_is_refused() -> None:
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        """Stands for torch's, which wants a process group."""

    model, x = mlp(), inputs()
    kill(model, 0, 1)
    live = live_units(model, [x])
    optimizer = ZeroRedundancyOptimizer(model.parameters(), lr=0.1)
    for call in (lambda: compact(model, live, x, optimizer), lambda: demp_of(model, optimizer)):
        with pytest.raises(TypeError, match=r"optimizer is ZeroRedundancyOptimizer, which shards.*plain optimizer"):
            call()
    assert model[0].out_features == 8


# Names


def test_missing_masks_are_all_live_and_one_mask_cuts_one_layer() -> None:
    model, x = mlp(), inputs()
    kill(model, 0, 2)
    kill(model, 3, 1)
    report = compact(model, {"3": live_units(model, [x])["3"]}, x)
    assert [(n, r.cut) for n, r in report.layers.items()] == [("0", 0), ("3", 1)]


def test_the_older_sharded_wrapper_is_refused_by_name_too() -> None:
    class FullyShardedDataParallel(nn.Module):
        """Stands for torch's, which wants a process group."""

        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x: Tensor) -> Tensor:
            return self.module(x)

    model = nn.Sequential(FullyShardedDataParallel(mlp()), nn.Linear(3, INPUTS).double())
    optimizer = adamw(model)
    held = [id(p) for p in model.parameters()]
    with pytest.raises(
        ValueError, match=r"^0 is sharded by FSDP \(FullyShardedDataParallel\).*DistributedDataParallel"
    ):
        demp_of(model, optimizer)
    for run in (lambda: live_units(model, [inputs()]), lambda: compact(model, {}, inputs())):
        with pytest.raises(ValueError, match=r"^0: is sharded by FSDP"):
            run()
    assert [id(p) for p in model.parameters()] == held
    assert not optimizer._optimizer_step_pre_hooks
