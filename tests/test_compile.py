"""torch.compile of the step: fullgraph, equal to the eager step, and compiled no more often than documented.

A learning rate in a tensor may change for ever; a float one is a constant of the graph, as in torch, so each new value
compiles anew.
"""

from __future__ import annotations

import pytest
import torch
from helpers import each_class, ids, same_bits, snapshot, take_steps
from torch import nn
from torch._dynamo.backends.registry import lookup_backend
from torch.optim import lr_scheduler

import torsion

SHAPES = [(5, 3), (7,), ()]

# dynamo reports that it passes over the profiler's record_function around every optimizer step.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Profiler function"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning"),  # of torch, in torch
]


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Compiler:
    """A backend that counts graphs. Its own first call may come twice: torch restarts one analysis per process."""

    def __init__(self, name):
        self.compile, self.graphs = lookup_backend(name), 0

    def __call__(self, graph, examples):
        self.graphs += 1
        return self.compile(graph, examples)


class Twins:
    """Two optimizers over equal parameters, one stepping compiled."""

    def __init__(self, cls, dtypes=(torch.float32,) * 3, name="eager", groups=1, rate=0.01, **options):
        self.compiler = Compiler(name)
        self.optimizers = []
        for _ in range(2):
            generator = torch.Generator().manual_seed(1)
            params = [
                nn.Parameter(torch.randn(s, generator=generator).to(d)) for s, d in zip(SHAPES, dtypes, strict=True)
            ]
            lr = rate.clone() if isinstance(rate, torch.Tensor) else rate
            torch.manual_seed(0)  # one seed for random rounding
            self.optimizers.append(cls([{"params": params[k::groups]} for k in range(groups)], lr=lr, **options))
        self.eager, self.compiled = self.optimizers
        self.step = torch.compile(self.compiled.step, backend=self.compiler, fullgraph=True)
        self.seed = 0

    def params(self, optimizer):
        return [p for g in optimizer.param_groups for p in g["params"]]

    def run(self, steps=1, value=None, without=()):
        """Steps of both; afterwards everything is the same, bit for bit. Returns how many graphs that took."""
        before = self.compiler.graphs
        for _ in range(steps):
            self.seed += 1
            for optimizer in self.optimizers:
                generator = torch.Generator().manual_seed(self.seed)
                for i, p in enumerate(self.params(optimizer)):
                    grad = torch.randn(p.shape, generator=generator).to(p.dtype)
                    p.grad = None if i in without else grad if value is None else torch.full_like(p, value)
            self.eager.step()
            self.step()
            assert same_bits(snapshot(self.compiled), snapshot(self.eager)), f"step {self.seed}"
            for report in ("cosine", "damping"):
                ours, theirs = getattr(self.compiled, report)(), getattr(self.eager, report)()
                assert ours.keys() == theirs.keys()
                assert same_bits(list(ours.values()), list(theirs.values()))
            norms = [o.grad_norm() for o in self.optimizers]
            assert same_bits(norms[:1], norms[1:])
            assert torch.equal(*(o.skipped_steps() for o in self.optimizers))
        return self.compiler.graphs - before

    def each(self, change):
        for optimizer in self.optimizers:
            change(optimizer)


OPTIONS = {
    "defaults": {},
    "groups": {"groups": 2, "scope": "group", "weight_decay": 0.1},
    "tensor-scope": {"scope": "tensor", "groups": 3},
    "clipped": {"max_grad_norm": 0.1},
    "maximized": {"maximize": True, "groups": 2},
    "mixed-dtypes": {"dtypes": (torch.bfloat16, torch.float64, torch.float32)},
    "float64": {"dtypes": (torch.float64,) * 3},
    "random-rounding": {"dtypes": (torch.bfloat16, torch.float16, torch.float32), "stochastic_rounding": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each_class
def test_equals_the_eager_step(cls, options):
    twins = Twins(cls, name="aot_eager", **options)
    assert twins.run() <= 2
    assert twins.run(3) == 0


def test_clone_seeds_once():
    twins = Twins(torsion.TAM, name="aot_eager", init="clone")
    twins.run(3)
    assert twins.compiler.graphs <= 2, "the first step is told from the others by the kernel, not by the graph"


@pytest.mark.slow
@pytest.mark.parametrize("cls", [torsion.TAM, torsion.AdaTAMW], ids=ids)
def test_inductor(cls):
    rate = torch.tensor(0.01)
    twins = Twins(cls, name="inductor", groups=2, rate=rate, max_grad_norm=0.5)
    twins.run()
    twins.each(lambda o: [g["lr"].mul_(0.5) for g in o.param_groups])
    assert twins.run(2) == 0
    twins.run(1, value=float("nan"))
    assert int(twins.compiled.skipped_steps()) == 1


# A scheduler wraps the step, and torch warns where it cannot see that called; dynamo skips the wrapper (next test).
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ids)
@pytest.mark.parametrize("name", ["eager", "aot_eager"])
@each_class
def test_a_rate_in_a_tensor_never_compiles_again(cls, name, dtype):
    twins = Twins(cls, name=name, rate=torch.tensor(0.01, dtype=dtype))
    schedulers = [lr_scheduler.ExponentialLR(o, gamma=0.5) for o in twins.optimizers]
    twins.run()
    for _ in range(4):
        for s in schedulers:
            s.step()
        assert twins.run() == 0
    assert float(twins.compiled.param_groups[0]["lr"]) == pytest.approx(0.01 / 16)


def test_compiled_after_a_scheduler_took_the_step():
    twins = Twins(torsion.TAM, rate=torch.tensor(0.01))
    schedulers = [lr_scheduler.ExponentialLR(o, gamma=0.5) for o in twins.optimizers]
    # Not fullgraph, as with torch's own optimizers: dynamo refuses to enter the scheduler's wrapper, not the step.
    twins.step = torch.compile(twins.compiled.step, backend=twins.compiler)
    for _ in range(3):
        twins.run()
        for s in schedulers:
            s.step()
    assert twins.compiler.graphs == 1


def test_rates_in_tensors_per_group():
    twins = Twins(torsion.TAM, name="aot_eager", groups=3, rate=torch.tensor([0.01]))
    twins.each(lambda o: o.param_groups[1].update(lr=0.5))
    twins.run()
    twins.each(lambda o: o.param_groups[2]["lr"].fill_(0.25))
    assert twins.run() == 0


def test_a_float_rate_compiles_anew_for_each_value():
    twins = Twins(torsion.TAM, name="aot_eager")
    twins.run()
    for rate in (0.02, 0.03, 0.04):
        twins.each(lambda o, rate=rate: o.param_groups[0].update(lr=rate))
        assert twins.run() >= 1
    twins.each(lambda o: o.param_groups[0].update(lr=0.02))
    assert twins.run() == 0, "a value seen before has its graph"


@pytest.mark.parametrize(
    "change", [{"momentum": 0.5}, {"weight_decay": 0.1}, {"maximize": True}, {"scope": "tensor"}], ids=str
)
def test_a_changed_option_counts_at_the_next_step(change):
    twins = Twins(torsion.TAM, name="aot_eager")
    twins.run(2)
    twins.each(lambda o: o.param_groups[0].update(change))
    twins.run(2)


def test_a_skipped_step_needs_no_graph_of_its_own():
    twins = Twins(torsion.AdaTAMW, name="aot_eager")
    twins.run(2)
    assert twins.run(1, value=float("inf")) == 0
    assert twins.run() == 0
    assert int(twins.compiled.skipped_steps()) == 1


def test_gradients_come_and_go():
    twins = Twins(torsion.TAM, name="aot_eager", scope="tensor")
    twins.run(2, without=(1,))
    twins.run(2)
    twins.run(1, without=(0, 2))
    twins.run(1, without=(0, 1, 2))
    twins.run(1)


def test_no_gradient_at_the_first_step():
    twins = Twins(torsion.TAM, name="aot_eager")
    twins.run(1, without=(0, 1, 2))
    assert twins.compiled.cosine() == {}
    twins.run(2)


def test_eager_and_compiled_steps_may_alternate():
    twins = Twins(torsion.AdaTAM, name="aot_eager", bias_correction=True)
    twins.run()
    compiled, twins.step = twins.step, twins.compiled.step
    twins.run(2)
    twins.step = compiled
    assert twins.run(2) == 0


def test_checkpoints_groups_and_edited_state_between_steps():
    twins = Twins(torsion.TAM, name="aot_eager", scope="tensor")
    twins.run(2)
    saved = twins.eager.state_dict()
    twins.run(1)
    twins.each(lambda o: o.load_state_dict(saved))
    twins.run(2)
    twins.each(lambda o: o.add_param_group({"params": [nn.Parameter(torch.ones(3))], "lr": 0.5}))
    twins.run(2)

    def edit(optimizer):
        for p in twins.params(optimizer):
            optimizer.state[p]["correlation"].fill_(0.5)
            optimizer.state[p]["momentum_buffer"] = torch.ones_like(p)

    twins.each(edit)
    twins.run(2)
    twins.each(lambda o: o.state.clear())
    twins.run(2)


def test_scaled_gradients():
    twins = Twins(torsion.TAM, name="aot_eager", max_grad_norm=0.1)
    twins.run()

    def scale(optimizer):
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)

    twins.each(scale)
    twins.run()
    twins.each(lambda o: o.grad_scale.mul_(2))
    assert twins.run() == 0
    twins.each(lambda o: o.found_inf.fill_(1))
    assert twins.run() == 0
    assert int(twins.compiled.skipped_steps()) == 1


def test_a_scale_that_is_a_number():
    twins = Twins(torsion.TAM, name="aot_eager")
    twins.each(lambda o: setattr(o, "grad_scale", 4.0))
    twins.run(2)


def test_a_model_trained_by_compiled_steps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    x = torch.randn(64, 4)
    y = x.sum(1, keepdim=True)
    optimizer = torsion.AdaTAMW(model.parameters(), lr=torch.tensor(1e-2), bias_correction=True)
    step = torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10


# What a graph cannot hold is said, and stepping without it works


def refused(optimizer, message):
    """Also at the first step, of which nothing then remains."""
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=message):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    assert same_bits(snapshot(optimizer), before)
    optimizer.step()


def test_layouts_that_need_copies():
    p = nn.Parameter(torch.randn(4, 3))
    optimizer = torsion.TAM([("weight", p)])
    p.grad = torch.ones(3, 4).t()
    refused(optimizer, r"weight: its gradient differs in layout.*call step\(\) outside torch\.compile")


@pytest.mark.backend("cpu")
def test_a_back_end_that_the_op_does_not_run():
    p = nn.Parameter(torch.randn(4, 3))
    optimizer = torsion.TAM([("weight", p)], backend="reference")
    take_steps(optimizer, [[torch.ones(4, 3)]])
    refused(optimizer, r"weight: its back end is 'reference', torch\.compile takes 'cpu'")


def test_bad_input_is_refused_by_name():
    optimizer = torsion.TAM([("weight", nn.Parameter(torch.randn(1).expand(4)))])
    (p,) = optimizer.param_groups[0]["params"]
    p.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"weight: its elements share memory.*make it \.contiguous\(\)"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    assert not optimizer.state
