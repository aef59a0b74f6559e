"""What several test modules share: back ends, layouts, arguments of the ops, an optimizer led beside the judge."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import tolerances
import torch
from judge import Judge
from tolerances import close
from torch import Tensor

import torsion
from torsion.ops import _dispatch, _native
from torsion.ops._rules import ADATAM, TAM, Rule

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOW = [torch.bfloat16, torch.float16]
RULES = {torsion.TAM: TAM, torsion.AdaTAM: ADATAM, torsion.AdaTAMW: ADATAM}
CLASSES = list(RULES)
STATES = ("momentum_buffer", "exp_avg", "exp_avg_sq")
CHUNK = 16384


def ids(value: object) -> str | None:
    """Readable ids for dtypes and classes."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return value.__name__ if isinstance(value, type) else None


def each_dtype(*dtypes: torch.dtype) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("dtype", dtypes or DTYPES, ids=ids)


each_class = pytest.mark.parametrize("cls", CLASSES, ids=ids)


@dataclass(frozen=True)
class Target:
    """A back end on a device."""

    id: str
    backend: str
    device: str = "cpu"
    interpreted: bool = False

    def optimizer(self, cls: Any, params: Any, **keywords: Any) -> Any:
        return cls(params, backend=self.backend, **keywords)

    def parameter(
        self, values: Any, dtype: torch.dtype = torch.float64, layout: str = "contiguous"
    ) -> torch.nn.Parameter:
        """A leaf with these values in memory of its own."""
        values = torch.as_tensor(values, dtype=torch.float64).to(self.device, dtype, copy=True)
        return torch.nn.Parameter(lay(values, layout))


TARGETS = [Target("cpu", "cpu"), Target("reference", "reference")]
if not torch.cuda.is_available():  # the interpreter is chosen for a whole process
    TARGETS.append(Target("triton-interpreter", "triton", interpreted=True))
TARGETS += [
    Target("cuda", "cuda", "cuda"),
    Target("triton-gpu", "triton", "cuda"),
    Target("reference-gpu", "reference", "cuda"),
]


# Layouts: the same values, elsewhere in memory


def _contiguous(t: Tensor) -> Tensor:
    return t.contiguous()


def _channels_last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _transposed(t: Tensor) -> Tensor:
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def _every_second(t: Tensor) -> Tensor:
    """A view with holes; what lies in them must not be touched."""
    wide = t.new_full((*t.shape[:-1], 2 * t.shape[-1]), HOLE)
    wide[..., ::2] = t
    return wide[..., ::2]


def _misaligned(t: Tensor) -> Tensor:
    """Contiguous, one element past an aligned address, so that no vector access fits."""
    room = t.new_full((t.numel() + 1,), HOLE)
    room[1:] = t.flatten()
    return room[1:].view(t.shape)


def _expanded(t: Tensor) -> Tensor:
    """All elements in one place, as the gradient of a sum; equal values only."""
    return t.flatten()[0].expand(t.shape)


HOLE = 77.0
LAYOUTS = {
    "contiguous": _contiguous,
    "channels_last": _channels_last,
    "transposed": _transposed,
    "every_second": _every_second,
    "misaligned": _misaligned,
    "expanded": _expanded,
}


def lay(t: Tensor, layout: str) -> Tensor:
    """``t``'s values in memory as ``layout`` says; same sizes."""
    return LAYOUTS[layout](t)


# An optimizer beside the judge


@dataclass
class Duel:
    """An optimizer and the judge, given the same gradients and compared after each step.

    Parameters of 8 or 11 bits are lost to rounding after one step, whoever is right; there the judge starts each step
    from what the optimizer stores.
    """

    target: Target
    cls: Any
    groups: Sequence[Mapping[str, Any]]
    keywords: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    grad_layout: str | None = None

    def __post_init__(self) -> None:
        """Build both. ``groups`` hold parameters that already lie on the target."""
        self.adaptive = self.cls is not torsion.TAM
        self.params = [p for g in self.groups for p in g["params"]]
        self.optimizer = self.target.optimizer(self.cls, [dict(g) for g in self.groups], **self.keywords)
        known = {k: v for k, v in self.keywords.items() if k not in ("stochastic_rounding",)}
        if self.cls is torsion.AdaTAMW:
            known = {"weight_decay": 1e-2, **known, "decoupled_weight_decay": True}
        self.judge = Judge(self.groups, adaptive=self.adaptive, **known)
        self.stochastic = bool(self.keywords.get("stochastic_rounding"))
        shared = [p.dtype for p in self.params]
        self.shared_dtype = torch.float64 if torch.float64 in shared else torch.float32
        self.steps = 0

    def step(self, grads: Sequence[Tensor | None], **scaling: float) -> None:
        """One step of both with ``grads`` (cast to the parameters' dtypes), then compare everything."""
        given = []
        for p, g in zip(self.params, grads, strict=True):
            if g is None:
                p.grad = None
            else:
                p.grad = lay(g.to(p.device, p.dtype), self.grad_layout or "contiguous")
            given.append(None if g is None else p.grad)
        if any(p.dtype in LOW for p in self.params):
            self._adopt()
        self.optimizer.step()
        self.judge.step(given, **scaling)
        self.steps += 1
        self.compare()

    def _adopt(self) -> None:
        for p, cell in zip(self.params, self.judge.cells, strict=True):
            cell.theta = p.detach().cpu().double().clone()
            state = self.optimizer.state.get(p)
            if state:
                cell.m = state["exp_avg" if self.adaptive else "momentum_buffer"].cpu().double().clone()
                cell.v = state["exp_avg_sq"].cpu().double().clone() if self.adaptive else cell.v

    def compare(self) -> None:
        # All tensors have gradients of one size, and what is left where terms cancel keeps the error of that size.
        largest = {
            k: max(float(getattr(c, k).abs().max()) for c in self.judge.cells if c.m.numel()) for k in ("theta", "m")
        }
        for p, cell in zip(self.params, self.judge.cells, strict=True):
            where = f"step {self.steps}, {tuple(p.shape)} {cell.scope}"
            stored = (tolerances.STORED_STOCHASTIC if self.stochastic else tolerances.STORED).get(p.dtype)
            close(p, cell.theta, stored or tolerances.STORED[p.dtype], f"{where}: parameter", largest["theta"])
            state = self.optimizer.state.get(p, {})
            if not state:
                assert cell.t == 0, f"{where}: no state after {cell.t} steps"
                continue
            row = tolerances.STATE[p.dtype]
            momentum = state["exp_avg" if self.adaptive else "momentum_buffer"]
            close(momentum, cell.m, row, f"{where}: momentum", largest["m"])
            if self.adaptive:
                close(state["exp_avg_sq"], cell.v, row, f"{where}: second moment")
            assert float(state["step"]) == cell.t, where
            correlation = self.judge.correlation.get(cell.scope, 0.0)
            close(state["correlation"], correlation, tolerances.COSINE[self.shared_dtype], f"{where}: s^")
        self._compare_reports()

    def _compare_reports(self) -> None:
        row = tolerances.COSINE[self.shared_dtype]
        cosines, dampings = self.optimizer.cosine(), self.optimizer.damping()
        assert set(cosines) == set(dampings) == set(self.judge.s)
        for scope, s in self.judge.s.items():
            close(cosines[scope], s, row, f"step {self.steps}: cosine of {scope}")
            close(dampings[scope], self.judge.damping(scope), row, f"step {self.steps}: damping of {scope}")
        low = self.dtype if self.shared_dtype == torch.float32 else torch.float64
        norm_row = tolerances.SUMS if low == torch.float64 else tolerances.NORM
        close(self.optimizer.grad_norm(), self.judge.grad_norm, norm_row, f"step {self.steps}: gradient norm")
        assert int(self.optimizer.skipped_steps()) == self.judge.skipped


SMALL = [(5,), (3, 2, 2, 3), (), (1,), (0, 4)]
LARGE = [(33,), (4, 7, 3, 3), (), (1,), (0, 4), (CHUNK + 37,), (129, 130)]
"""Shapes: vectors, a convolution, a scalar, nothing at all; the large ones end a little past a chunk."""


def shapes_for(target: Target) -> list[tuple[int, ...]]:
    return SMALL if target.interpreted else LARGE


def randoms(shapes: Sequence[tuple[int, ...]], scale: float = 1.0) -> list[Tensor]:
    """float64 on the CPU, so that every target and dtype starts from the same numbers."""
    return [scale * torch.randn(shape, dtype=torch.float64) for shape in shapes]


def two_groups(target: Target, dtype: torch.dtype, **second: Any) -> list[dict[str, Any]]:
    """Parameters of every shape in two groups, the second with settings of its own."""
    params = [target.parameter(t, dtype) for t in randoms(shapes_for(target))]
    return [{"params": params[::2]}, {"params": params[1::2], **second}]


def shapes_of(groups: Sequence[Mapping[str, Any]]) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for g in groups for p in g["params"]]


# Runs without the judge


def snapshot(optimizer: Any) -> list[Tensor]:
    """Copies of every parameter and of all tensors of the optimizer's state, in order."""
    tensors = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state.get(p, {})
            tensors += [p.detach().clone(), *(state[k].clone() for k in sorted(state) if isinstance(state[k], Tensor))]
    return tensors


def bits(t: Tensor) -> Tensor:
    """The bytes of a tensor, for comparisons in which NaN equals itself and 0 is not -0."""
    return t.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def exact_root(t: Tensor) -> Tensor:
    """The square root rounded once, by numpy; torch's, on a CPU, is off by a bit now and then."""
    return torch.from_numpy(np.asarray(np.sqrt(t.numpy())))


def same_bits(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(
        x.dtype == y.dtype and torch.equal(bits(x), bits(y)) for x, y in zip(a, b, strict=True)
    )


def take_steps(optimizer: Any, gradients: Sequence[Sequence[Tensor | None]]) -> None:
    """Steps with these gradients, one list per step, one entry per parameter."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for grads in gradients:
        for p, g in zip(params, grads, strict=True):
            p.grad = None if g is None else g.to(p.device, p.dtype)
        optimizer.step()


def twin(optimizer: Any) -> Any:
    """A deep copy of an optimizer together with its parameters."""
    return copy.deepcopy(optimizer)


# Arguments of the ops


HYPER = {
    "lr": 0.1,
    "momentum": 0.9,
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "decay": 0.9,
    "eps_damping": 1e-8,
}


def hyper(rule: Rule, *groups: Mapping[str, float]) -> Tensor:
    """A float64 ``[G, H]`` from names, a row per group, one if none is given; the rest is a default or 0."""
    rows = [[{**HYPER, **group}.get(name, 0.0) for name in rule.hyper] for group in groups or ({},)]
    return torch.tensor(rows, dtype=torch.float64)


@dataclass
class Call:
    """Arguments of a list op over ``params``, one scope and one group, which a test may then change."""

    rule: Rule
    params: list[Tensor]
    grads: list[Tensor] = field(default_factory=list)
    states: list[list[Tensor]] = field(default_factory=list)
    numbers: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Zeros where nothing is given."""
        device = self.params[0].device if self.params else torch.device("cpu")
        self.grads = self.grads or [torch.zeros_like(p) for p in self.params]
        if not self.states:
            wide = [torch.float64 if p.dtype == torch.float64 else torch.float32 for p in self.params]
            self.states = [
                [torch.zeros_like(p, dtype=d) for p, d in zip(self.params, wide, strict=True)] for _ in self.rule.states
            ]
        self.shared = torch.tensor([[0.0, 0.0, 0.5]], dtype=torch.float64, device=device)
        self.steps = torch.zeros(len(self.params), device=device)
        self.status = torch.zeros(4, dtype=torch.int64, device=device)
        self.hyper = hyper(self.rule, self.numbers)
        n = len(self.params)
        self.scopes, self.groups, self.slots = [0] * n, [0] * n, list(range(n))
        self.lrs: list[Tensor] = []
        self.grad_scale: Tensor | None = None
        self.found_inf: Tensor | None = None
        self.max_grad_norm: float | None = None

    def run(self, backend: str | None = None) -> None:
        """Call the documented function."""
        getattr(torsion.ops, self.rule.op)(
            self.params, self.grads, *self.states, self.shared, self.steps, self.status, self.hyper,
            scopes=self.scopes, groups=self.groups, slots=self.slots, lrs=self.lrs, grad_scale=self.grad_scale,
            found_inf=self.found_inf, max_grad_norm=self.max_grad_norm, backend=backend,
        )  # fmt: skip

    def positional(self) -> tuple[Any, ...]:
        """What ``torch.ops.torsion`` takes."""
        return (
            self.params, self.grads, *self.states, self.shared, self.steps, self.status, self.hyper, self.lrs,
            self.scopes, self.groups, self.slots, self.grad_scale, self.found_inf, self.max_grad_norm,
        )  # fmt: skip

    def step(self) -> torsion.ops.Step:
        """The same as the Python back ends take it."""
        lists = self.params, self.grads, self.states
        return torsion.ops.Step(*lists, *self.positional()[2 + len(self.states) :])

    def written(self) -> list[Tensor]:
        return [*self.params, *(t for s in self.states for t in s), self.shared, self.steps, self.status]

    def copy(self) -> Call:
        return copy.deepcopy(self)


# A step in halves, as sharded training runs it


_KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}


def table_of(call: Call, weights: Sequence[float] = (), keys: Sequence[int] = ()) -> Any:
    """The call's tensors as a launch table of the compiled back ends."""
    stochastic = bool(call.hyper[0, 4])
    table = _native.plan.Table()
    table.build(
        pointers=[[t.data_ptr() for t in stream] for stream in (call.params, call.grads, *call.states)],
        numel=[p.numel() for p in call.params],
        kinds=[_KINDS[p.dtype] + 2 * (stochastic and p.dtype in LOW) for p in call.params],
        scopes=call.scopes, groups=call.groups, slots=call.slots, weights=weights, keys=keys,
        n_scopes=call.shared.shape[0], n_groups=call.hyper.shape[0],
    )  # fmt: skip
    return table


def workspace_of(call: Call, table: Any) -> Tensor | None:
    """Where the table lies on a GPU."""
    if call.shared.device.type == "cpu":
        return None
    return torch.empty(table.workspace_bytes(call.rule.name), dtype=torch.uint8, device=call.shared.device)


def planned(call: Call, table: Any, phase: int, sums: Tensor | None, workspace: Tensor | None) -> tuple[Any, ...]:
    """Arguments of the planned op."""
    return (
        table.address, call.shared, call.steps, call.status, call.hyper, call.lrs, call.grad_scale, call.found_inf,
        call.max_grad_norm, phase, sums, workspace,
    )  # fmt: skip


def halves(
    call: Call, target: Target, weights: Sequence[float] = (), keys: Sequence[int] = ()
) -> tuple[Tensor, Callable[[], None]]:
    """The sums of a step, and a function that does the rest of it."""
    if target.backend in ("triton", "reference"):
        step = call.step()
        step.weights, step.keys = weights, keys
        sums = _dispatch.reduce(call.rule, step, target.backend)
        return sums, lambda: _dispatch.apply_(call.rule, step, sums, target.backend)
    table = table_of(call, weights, keys)
    op = getattr(torch.ops.torsion, f"{call.rule.name}_planned_")
    sums = torch.empty(call.shared.shape[0] + 1, 3, dtype=torch.float64, device=target.device)
    workspace = workspace_of(call, table)
    op(*planned(call, table, 1, sums, workspace))
    return sums, lambda: op(*planned(call, table, 2, sums, workspace))


each_rule = pytest.mark.parametrize("rule", [TAM, ADATAM], ids=lambda rule: rule.name)
