"""Nobody's random numbers and nobody's state: what DemP must leave as it found it, when it works and when it fails."""

from __future__ import annotations

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from demp_runs import INPUTS, adamw, advance, demp_of, everything, inputs, kill, mlp, same, windows
from prune_models import build as network
from prune_models import random_masks, snapshot
from prune_models import same as same_snapshots
from torch import Tensor, nn

import torsion
from torsion.prune import _shrink, compact, live_units
from torsion.prune._cut import cut
from torsion.prune._keep import align_and_keep
from torsion.prune._structure import trace


def states() -> dict[str, Any]:
    """Of torch's, numpy's and Python's global generators."""
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002 - it is the global one that is looked at
    return {"torch": torch.get_rng_state(), "numpy": [kind, keys.tolist(), *rest], "python": random.getstate()}


def draw() -> float:
    return float(torch.rand(())) + float(np.random.rand()) + random.random()  # noqa: NPY002


class Restless(nn.Module):
    """Draws from every generator in its forward, writes into one buffer and puts a new one in another's place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = mlp()
        self.register_buffer("written", torch.zeros(()))
        self.register_buffer("replaced", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.written += 1
        self.replaced = self.replaced + draw()
        return self.body(x)


def drawing() -> Iterator[Tensor]:
    """A window that shuffles with every generator."""
    for batch in windows():
        draw()
        yield batch


@pytest.fixture(autouse=True)
def seeded() -> None:
    np.random.seed(0)  # noqa: NPY002
    random.seed(0)
    torch.manual_seed(0)


def test_no_call_moves_a_generator_or_a_buffer() -> None:
    model = Restless()
    optimizer = adamw(model)
    before = states()
    held = model.replaced, model.written.clone()
    demp = demp_of(model, optimizer)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for _ in range(4):
        optimizer.step()
    kill(model.body, 0, 1)
    demp.observe(drawing)
    report = demp.step(drawing())
    assert report is not None
    assert report.layers["body.0"].cut == 1
    kill(model.body, 0, 0)
    live_units(model, [inputs()])
    demp.finish(drawing)
    kill(model.body, 3, 0)
    compact(model, live_units(model, [inputs()]), inputs(), optimizer)
    saved = demp.state_dict()
    other = Restless()
    after_building = states()
    demp_of(other, adamw(other)).load_state_dict(saved)
    assert same(states(), after_building)
    assert model.replaced is held[0]
    assert torch.equal(model.written, held[1])
    torch.manual_seed(0)
    Restless()
    assert same(before["numpy"], after_building["numpy"])
    assert before["python"] == after_building["python"]


class Cached(nn.Module):
    """Keeps positions in a buffer, replaced by a larger one for longer inputs, and their number beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.most = mlp(), 4
        self.register_buffer("positions", torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most:
            self.most = len(x)
            self.positions = torch.arange(float(self.most))
        return self.body(x) + 0 * self.positions[: len(x), None]


def test_a_cache_that_grows_in_a_window_stays_whole() -> None:
    model = Cached()
    demp = torsion.DemP(model, adamw(model), inputs(n=4), total_steps=3)
    demp.finish([inputs(n=20)])
    assert model.most == len(model.positions) == 20
    model(inputs(n=20))


def test_generators_between_building_and_the_last_cut() -> None:
    model = Restless()
    optimizer = adamw(model)
    demp = demp_of(model, optimizer)
    for _ in range(2):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        before = states()
        for _ in range(4):
            optimizer.step()
        kill(model.body, 0, 1)
        assert demp.step(drawing()) is not None
        assert same(states(), before)


def poison(batch: int, value: float) -> Iterator[Tensor]:
    for i, x in enumerate(windows()):
        x[3, 2] = value if i == batch else x[3, 2]
        draw()
        yield x


def broken() -> Iterator[Tensor]:
    draw()
    yield inputs()
    raise OSError("the disk is gone")


def build(model: Any, **arguments: Any) -> torsion.DemP:
    given = {"example_inputs": inputs(), "total_steps": 5, **arguments}
    return torsion.DemP(model, torch.optim.SGD(model.parameters(), lr=0.1), **given)


def of_another_model(model: Any, optimizer: Any, demp: Any) -> Callable[[], Any]:
    other = adamw(mlp())
    return lambda: demp_of(model, other)


def of_a_wider_model(model: Any, optimizer: Any, demp: Any) -> Callable[[], Any]:
    wide = mlp(widths=(9, 6))
    saved = demp_of(wide, adamw(wide)).state_dict()
    return lambda: demp.load_state_dict(saved)


def revived(model: Any, optimizer: Any, demp: Any) -> Callable[[], Any]:
    """Seen as dead, then alive again: the comparison of outputs takes the cut back."""
    demp.observe(drawing)
    with torch.no_grad():
        model.body[1].weight[1] = model.body[1].bias[1] = 1.0
    return demp.cut


def masks(**given: Tensor) -> dict[str, Tensor]:
    return {name.replace("_", "."): mask for name, mask in given.items()}


NAN, INF = float("nan"), float("inf")

# Every kind of bad input: what makes the call, its error, what the message must say.
BAD: dict[str, tuple[Callable[[Any, Any, Any], Callable[[], Any]], Any, str]] = {
    "criterion": (lambda m, o, d: lambda: build(m, criterion="never"), ValueError, "criterion='never'"),
    "schedule": (lambda m, o, d: lambda: build(m, schedule="cosine"), ValueError, "schedule='cosine'"),
    "negative lasso": (lambda m, o, d: lambda: build(m, lasso=-1.0), ValueError, "lasso=-1.0"),
    "negative noise": (lambda m, o, d: lambda: build(m, noise_std=-1.0), ValueError, "noise_std=-1.0"),
    "total_steps": (lambda m, o, d: lambda: build(m, total_steps=0), ValueError, "total_steps=0"),
    "optimizer": (of_another_model, ValueError, r"body\.0\.weight and 9 more: not in the optimizer \(AdamW\)"),
    "inputs": (lambda m, o, d: lambda: build(m, example_inputs=inputs()[:, 1:]), RuntimeError, r"float64 \(16, 5\)"),
    "exclude": (lambda m, o, d: lambda: build(m, exclude=("body.9",)), ValueError, r"no module 'body\.9'"),
    "nan": (lambda m, o, d: lambda: d.step(poison(0, NAN)), RuntimeError, r"^body\.0: .*unit 0 .*batch 0"),
    "inf": (lambda m, o, d: lambda: d.finish(poison(1, INF)), RuntimeError, r"^body\.0: .*unit \d .*batch 1"),
    "monitor": (lambda m, o, d: lambda: live_units(m, lambda: poison(1, NAN)), RuntimeError, r"^body\.0: .*unit 0 "),
    "batches": (lambda m, o, d: lambda: d.step(broken), OSError, "the disk is gone"),
    "batch": (lambda m, o, d: lambda: d.step([inputs(), inputs()[:, 1:]]), RuntimeError, "batch 1 of the window"),
    "outputs": (revived, RuntimeError, "the cut changes an output"),
    "compact": (
        lambda m, o, d: lambda: compact(m, masks(body_3=torch.arange(6) > 0), inputs(), o),
        RuntimeError,
        "the cut changes an output",
    ),
    "mask": (
        lambda m, o, d: lambda: compact(m, masks(body_0=torch.ones(3) > 0), inputs()),
        ValueError,
        r"^body\.0: the mask has shape \(3,\)",
    ),
    "logits": (
        lambda m, o, d: lambda: compact(m, masks(body_6=torch.arange(3) > 0), inputs()),
        ValueError,
        r"^body\.6: cannot be cut: it reaches the model's output",
    ),
    "checkpoint": (of_a_wider_model, ValueError, r"^body|^0"),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_changes_nothing(bad: str) -> None:
    """Model, optimizer, DemP and every random state, bit for bit."""
    arrange, error, says = BAD[bad]
    model = Restless()
    optimizer = adamw(model)
    demp = demp_of(model, optimizer, prune_every=2)
    kill(model.body, 0, 1)
    advance(model, optimizer, range(2))
    call = arrange(model, optimizer, demp)

    def all_of_it() -> list[Any]:
        held = [id(t) for t in [*model.parameters(), *model.buffers()]]
        seen = [demp.state_dict(), demp.live(), demp.generation, demp.due]
        return [everything(model, optimizer), states(), held, seen]

    before = all_of_it()
    with pytest.raises(error, match=says):
        call()
    assert same(all_of_it(), before)


def test_a_difference_of_settings_that_is_an_error_changes_nothing() -> None:
    """Where warnings are errors the checkpoint is refused before the cut, not after it."""
    model = mlp()
    demp = demp_of(model, adamw(model))
    kill(model, 0, 1)
    demp.finish(windows())
    saved = demp.state_dict()
    other = mlp()
    optimizer = adamw(other)
    again = demp_of(other, optimizer, lasso=0.5)
    before, own = everything(other, optimizer), again.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"lasso=0\.5 here"):
            again.load_state_dict(saved)
    assert same(everything(other, optimizer), before)
    assert same(again.state_dict(), own)
    assert again.generation == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("exclude", [(), ("3",)], ids=["cut", "excluded"])
def test_a_weight_that_is_not_finite_is_named_and_stays(value: float, exclude: tuple[str, ...]) -> None:
    """The whole model is compared, the NaN included, as its bits."""
    model = mlp()
    optimizer = adamw(model)
    demp = demp_of(model, optimizer, exclude=exclude)
    kill(model, 0, 1)
    advance(model, optimizer, range(4))
    with torch.no_grad():
        model[3].bias[2] = value

    def bits() -> list[Tensor]:
        return [p.detach().clone().view(torch.int64) for p in model.parameters()]

    before, state = bits(), everything(model[:3], optimizer)
    with pytest.raises(RuntimeError, match=r"^3: the activation of unit 2 is not finite in batch 0"):
        demp.step(windows())
    assert same(bits(), before)
    assert same(everything(model[:3], optimizer), state)
    assert model[0].weight.shape == (8, INPUTS)
    assert demp.due


@pytest.mark.parametrize("name", ["residual", "mobile", "up", "rms", "groups"])
def test_a_cut_that_breaks_off_anywhere_is_undone(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory runs out, or the user presses Ctrl-C, before each piece in turn: model, optimizer and copy stay."""
    model, x = network(name, 1)
    optimizer, ema = torch.optim.Adam(model.parameters()), copy.deepcopy(model)
    model(x).square().mean().backward()
    optimizer.step()
    structure = trace(model, x)
    keep = align_and_keep(structure, random_masks(structure, 3, live=0.3))
    layers = {n: layer.units for n, layer in structure.layers.items()}
    smaller, left = _shrink.smaller, 0

    def breaks(t: Tensor, axes: Any) -> Tensor:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return smaller(t, axes)

    monkeypatch.setattr(_shrink, "smaller", breaks)
    before = snapshot(model, optimizer), snapshot(ema)
    pieces = 0
    for pieces in range(1000):
        left = pieces
        try:
            cut(model, structure, keep, optimizer=optimizer, also=[ema], check=False)
        except KeyboardInterrupt:
            assert same_snapshots((snapshot(model, optimizer), snapshot(ema)), before), pieces
            assert {n: layer.units for n, layer in structure.layers.items()} == layers
        else:
            break
    assert pieces > 10
    assert sum(p.numel() for p in model.parameters()) == sum(p.numel() for p in ema.parameters())
    assert {n: layer.units for n, layer in structure.layers.items()} != layers


class Shifting(nn.Module):
    """Writes to its input."""

    def __init__(self):
        super().__init__()
        self.body = mlp()

    def forward(self, x):
        x -= 0.5
        return self.body(x)


def test_inputs_that_the_model_writes_to():
    """Outputs are compared on what they were made of, and the user's batches stay as they are."""
    model = Shifting()
    kill(model.body, 0, 1, 4)
    x, batches = inputs(), [inputs(1), inputs(2)]
    before = [t.clone() for t in (x, *batches)]
    demp = torsion.DemP(model, adamw(model), x, total_steps=10, window=2)
    report = demp.finish(batches)
    assert report.parameters_after < report.parameters_before
    assert report.max_difference < 1e-10
    torsion.prune.compact(model, torsion.prune.live_units(model, batches), x)
    assert all(torch.equal(a, b) for a, b in zip((x, *batches), before, strict=True))
