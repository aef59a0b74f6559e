"""What a user sees of a cut: recompilations, graphs to capture anew, gradients that no longer arrive, the report."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from demp_runs import adamw, advance, backward, demp_of, everything, inputs, kill, mlp, revive, same, windows
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

import torsion


@pytest.fixture
def graphs() -> Any:
    """A backend that counts the graphs it is given, with dynamo's caches empty before and after."""

    class Counter:
        compiled = 0

        def __call__(self, graph: Any, examples: Any) -> Any:
            self.compiled += 1
            return lookup_backend("eager")(graph, examples)

    torch._dynamo.reset()
    yield Counter()
    torch._dynamo.reset()


# torch.compile


def test_a_compiled_model_compiles_once_more_after_each_cut_and_not_otherwise(graphs: Any) -> None:
    """Edge case 12. Windows, cuts and comparisons run eagerly: they compile nothing."""
    model = mlp(dtype=torch.float32, widths=(12, 10))
    compiled = torch.compile(model, backend=graphs)
    optimizer = adamw(model)
    demp = demp_of(compiled, optimizer, noise_std=1e-3)
    advance(compiled, optimizer, range(3), demp)
    assert graphs.compiled == 1
    for cut in range(1, 4):
        kill(model, 0, 0, 3)
        kill(model, 3, 1)
        first = 4 * cut - 1
        assert advance(compiled, optimizer, range(first, first + 1), demp)[0].layers["0"].cut == 2
        assert demp.generation == cut
        advance(compiled, optimizer, range(first + 1, first + 4), demp)
        assert graphs.compiled <= 1 + cut, "one recompile per cut at most"
    seen = graphs.compiled
    assert seen > 1, "other shapes"
    assert advance(compiled, optimizer, range(15, 17), demp)[0].layers["0"].cut == 0
    assert graphs.compiled == seen, "a window that cut nothing"


def test_a_compiled_model_trains_as_the_eager_one_through_a_cut(graphs: Any) -> None:
    runs = []
    for wrap in (lambda m: m, lambda m: torch.compile(m, backend=graphs)):
        model = mlp()
        optimizer = adamw(model)
        kill(model, 0, 1, 5)
        advance(wrap(model), optimizer, range(9), demp_of(model, optimizer))
        runs.append(everything(model)["model"])
    assert runs[0]["0.weight"].shape[0] == 6
    assert same(*runs)


class Own(nn.Sequential):
    """With a forward of its own: dynamo passes over that of torch's containers."""

    def forward(self, x: Tensor) -> Tensor:
        for module in self:
            x = module(x)
        return x


@pytest.mark.parametrize("how", ["a part", "in place"])
def test_compiled_parts_are_looked_into(graphs: Any, how: str) -> None:
    """Windows and cuts run without their graphs, which would hide the activations; training compiles once more."""
    model = Own(*mlp())
    if how == "a part":
        model = nn.Sequential(torch.compile(model[:6], backend=graphs), model[6])
    else:
        model.compile(backend=graphs)
    inner = model[0]._orig_mod if how == "a part" else model
    optimizer = adamw(model)
    demp = demp_of(model, optimizer)
    assert [name[-1] for name in demp.live()] == ["0", "3"]
    advance(model, optimizer, range(3), demp)
    assert graphs.compiled == 1
    kill(inner, 0, 1)
    (report,) = advance(model, optimizer, range(3, 4), demp)
    assert [r.cut for r in report.layers.values()] == [1, 0]
    assert graphs.compiled == 1
    advance(model, optimizer, range(4, 7), demp)
    assert graphs.compiled == 2


COMPILED_STEP = pytest.mark.filterwarnings(
    "ignore:Profiler function", "ignore:.*torch.jit.script_method:DeprecationWarning"
)


@COMPILED_STEP
def test_lasso_and_noise_act_in_a_compiled_step(graphs: Any) -> None:
    runs = []
    for compiles in (False, True):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        demp = demp_of(model, optimizer, noise_std=0.05)
        step = torch.compile(optimizer.step, backend=graphs) if compiles else optimizer.step
        for number in range(3):
            backward(model, number)
            step()
        assert demp.steps_taken == 3
        runs.append([p.detach().clone() for p in model.parameters()])
    assert graphs.compiled
    assert same(*runs)


@COMPILED_STEP
def test_a_compiled_step_of_torsions_optimizers_is_refused(graphs: Any) -> None:
    """Lasso and noise are in their kernels, which take what changes at every step."""
    model = mlp()
    optimizer = torsion.TAM(model.parameters(), lr=0.05)
    demp = demp_of(model, optimizer)
    backward(model, 0)
    before = everything(model)
    with pytest.raises(Exception, match=r"DemP adds its lasso and noise inside the step; call step\(\) outside"):
        torch.compile(optimizer.step, backend=graphs)()
    assert same(everything(model), before)
    optimizer.step()
    assert demp.steps_taken == 1


# CUDA graphs


def test_the_generation_counts_cuts_that_changed_the_model() -> None:
    model = mlp()
    optimizer = adamw(model)
    demp = demp_of(model, optimizer)
    assert demp.generation == 0
    demp.finish(windows())
    with pytest.warns(UserWarning, match="empty"):
        demp.finish([])
    assert demp.generation == 0, "nothing was cut"
    kill(model, 0, 1)
    demp.finish(windows())
    assert demp.generation == 1
    other = mlp()
    again = demp_of(other, adamw(other))
    again.load_state_dict(demp.state_dict())
    assert again.generation == 1, "loading cut it"
    again.load_state_dict(demp.state_dict())
    assert again.generation == 1


def test_a_captured_step_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lasso and noise of one step would be replayed for ever. There is no GPU here: torch is told that it captures."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    demp = demp_of(model, optimizer)
    backward(model, 0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        before = everything(model)
        with pytest.raises(RuntimeError, match=r"graph captures optimizer\.step\(\).*forward and backward only"):
            optimizer.step()
        assert same(everything(model), before)
    optimizer.step()
    assert demp.steps_taken == 1


class Captured:
    """Stands for a CUDA graph of forward and backward: it goes on with the tensors there were at its making."""

    def __init__(self, model: nn.Sequential) -> None:
        self.model = model
        self.params: dict[str, Tensor] = dict(model.named_parameters())

    def replay(self, step: int) -> None:
        out = torch.func.functional_call(self.model, self.params, inputs(step))
        out.square().mean().backward()


def test_gradients_that_go_to_the_old_parameters_are_noticed() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    demp = demp_of(model, optimizer)
    graph = Captured(model)
    kill(model, 0, 1)
    graph.replay(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
        assert demp.finish(windows()).layers["0"].cut == 1
    optimizer.zero_grad()
    with pytest.warns(UserWarning, match=r"no gradient reached 0\.weight.*CUDA graph captured before the cut.*anew"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()  # said once
        kill(model, 0, 1)
        backward(model, 1)
        demp.finish(windows())
        backward(model, 2)
        optimizer.step()


@pytest.mark.parametrize("closed", [False, True], ids=["plain", "closure"])
@pytest.mark.parametrize("kind", ["sgd", "tam"])
def test_a_loop_that_goes_on_after_a_cut_hears_nothing(kind: str, closed: bool) -> None:
    model = mlp()
    cls = torsion.TAM if kind == "tam" else torch.optim.SGD
    optimizer = cls(model.parameters(), lr=0.01)
    demp = demp_of(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(9):
            kill(model, 0, 0)
            if closed:
                optimizer.step(lambda step=step: backward(model, step))
            else:
                backward(model, step)
                optimizer.step()
            demp.step(windows())
            optimizer.zero_grad()
    assert demp.generation == 2
    revive(model, 0, 0)


def test_nothing_is_said_where_there_never_were_gradients() -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    demp = demp_of(model, optimizer)
    kill(model, 0, 1)
    demp.finish(windows())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


# The report


def test_the_report_counts_what_is_there() -> None:
    model = mlp()
    demp = demp_of(model, adamw(model), exclude=("3",))
    before = sum(p.numel() for p in model.parameters())
    kill(model, 0, 1, 2)
    kill(model, 3, 0)
    report = demp.finish(windows())
    assert {n: (r.before, r.live, r.cut) for n, r in report.layers.items()} == {"0": (8, 6, 2), "3": (6, 6, 0)}
    # Two rows and bias, scale and shift of the first layer, two columns of the second.
    assert before - report.parameters_after == 2 * (6 + 3) + 2 * 6
    assert report.parameters_before == before
    assert f"{report.parameters_after:,}" in str(report)
