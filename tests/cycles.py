"""What the tests of Lookbehind share: bases, outer steps from given gradients, networks, the judge beside both."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import tolerances
import torch
from helpers import LOW, Target, lay, randoms, same_bits, shapes_for
from published import Published, TorchBase, TorqueBase
from tolerances import Row, close
from torch import Tensor, nn

import torsion

SGD, ADAM, ADAMW = torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW


class OwnSGD(SGD):
    """A class of the user's, which no kernel knows: the general path."""


class OwnAdamW(ADAMW):
    """Likewise."""


class OwnTAM(torsion.TAM):
    """Likewise."""


@dataclass(frozen=True)
class Base:
    """A base optimizer: its class and options, and whether the fused path takes it."""

    id: str
    cls: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    fused: bool = True

    def build(self, params: Any, **more: Any) -> Any:
        return self.cls(params, **{**self.options, **more})

    def judge(self, groups: Sequence[Mapping[str, Any]], **more: Any) -> TorchBase | TorqueBase:
        options = {**self.options, **more}
        if not issubclass(self.cls, (torsion.TAM, torsion.AdaTAM)):
            theirs = next(c for c in (SGD, ADAMW, ADAM, self.cls) if issubclass(self.cls, c))
            return TorchBase(theirs, groups, options)
        adaptive, decoupled = issubclass(self.cls, torsion.AdaTAM), issubclass(self.cls, torsion.AdaTAMW)
        return TorqueBase(groups, options, adaptive=adaptive, decoupled=decoupled)

    def published(self, groups: Sequence[Mapping[str, Any]], **settings: Any) -> Published:
        return Published(groups, self.judge(groups), maximize=self.options.get("maximize", False), **settings)


FUSED = [
    Base("sgd", SGD, {"lr": 0.05}),
    Base("sgd-momentum", SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}),
    Base("sgd-nesterov", SGD, {"lr": 0.05, "momentum": 0.8, "weight_decay": 0.01, "nesterov": True}),
    Base("sgd-dampening", SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3}),
    Base("sgd-maximize", SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01, "maximize": True}),
    Base("adam", ADAM, {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    Base("adam-maximize", ADAM, {"lr": 0.01, "maximize": True}),
    Base("adamw", ADAMW, {"lr": 0.01, "betas": (0.9, 0.99), "weight_decay": 0.1}),
    Base("tam", torsion.TAM, {"lr": 0.05, "weight_decay": 5e-4}),
    Base("tam-tensor-clipped", torsion.TAM, {"lr": 0.05, "scope": "tensor", "max_grad_norm": 0.5, "init": "clone"}),
    Base("tam-decoupled", torsion.TAM, {"lr": 0.05, "weight_decay": 0.1, "decoupled_weight_decay": True}),
    Base("adatam", torsion.AdaTAM, {"lr": 0.001, "weight_decay": 0.1, "bias_correction": True}),
    Base("adatamw", torsion.AdaTAMW, {"lr": 0.001, "weight_decay": 0.1, "scope": "group", "maximize": True}),
]
GENERAL = [
    Base("own-plain-sgd", OwnSGD, {"lr": 0.05}, fused=False),
    Base("own-sgd", OwnSGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 5e-4}, fused=False),
    Base("own-sgd-maximize", OwnSGD, {"lr": 0.05, "momentum": 0.9, "maximize": True}, fused=False),
    Base("own-adamw", OwnAdamW, {"lr": 0.01, "weight_decay": 0.1}, fused=False),
    Base("own-tam", OwnTAM, {"lr": 0.05, "weight_decay": 5e-4}, fused=False),
    Base("adamw-amsgrad", ADAMW, {"lr": 0.01, "amsgrad": True}, fused=False),
    Base("rmsprop", torch.optim.RMSprop, {"lr": 0.002, "momentum": 0.5}, fused=False),
]
BASE = {base.id: base for base in FUSED + GENERAL}
MOMENTUM = BASE["sgd-momentum"]


def each_base(*names: str) -> pytest.MarkDecorator:
    """Parametrize ``base`` over these, or over all."""
    chosen = [BASE[name] for name in names or BASE]
    return pytest.mark.parametrize("base", chosen, ids=[base.id for base in chosen])


each_kind = each_base("sgd-momentum", "adamw", "tam", "own-sgd")
"""The three shapes of state, and the general path."""

each_reuse = pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "full"])


def ahead(target: Target, base: Base, params: Any, **settings: Any) -> Any:
    """A Lookbehind over a new base, on the target's back end."""
    return target.optimizer(torsion.Lookbehind, base.build(params), **settings)


def parameters_of(optimizer: Any) -> list[nn.Parameter]:
    return [p for g in optimizer.param_groups for p in g["params"]]


def values_of(optimizer: Any) -> list[Tensor]:
    return [p.detach().clone() for p in parameters_of(optimizer)]


def base_state(optimizer: Any) -> list[Tensor]:
    """Copies of all tensors of the base's state, in the order of parameters and keys."""
    state = optimizer.base_optimizer.state
    kept = [state.get(p, {}) for p in parameters_of(optimizer)]
    return [s[k].clone() for s in kept for k in sorted(s) if isinstance(s[k], Tensor)]


def states_of(optimizer: Any) -> list[dict[str, Tensor]]:
    """Copies of the base's state of each parameter: tensors only, and none where no descent was made yet.

    A host that does not wait for the device makes state before it can know whether the descent will be; then it is 0.
    """
    state = optimizer.base_optimizer.state
    kept = [
        {k: v.clone() for k, v in state.get(p, {}).items() if isinstance(v, Tensor)} for p in parameters_of(optimizer)
    ]
    return [s if any(bool(t.any()) for t in s.values()) else {} for s in kept]


def same_states(a: Sequence[Mapping[str, Tensor]], b: Sequence[Mapping[str, Tensor]]) -> bool:
    """Bit for bit."""
    return len(a) == len(b) and all(
        x.keys() == y.keys() and same_bits([x[k] for k in sorted(x)], [y[k] for k in sorted(y)])
        for x, y in zip(a, b, strict=True)
    )


def everything(optimizer: Any) -> list[Tensor]:
    return values_of(optimizer) + base_state(optimizer)


# Outer steps from given gradients: no network, every evaluation known


Evaluations = Sequence[Sequence[Tensor | None]]


def evaluations(optimizer: Any, count: int) -> Evaluations:
    """Random gradients, a list per evaluation."""
    params = parameters_of(optimizer)
    return [[torch.randn_like(p) for p in params] for _ in range(count)]


def give(optimizer: Any, grads: Sequence[Tensor | None]) -> None:
    for p, g in zip(parameters_of(optimizer), grads, strict=True):
        p.grad = None if g is None else g.to(p.device, p.dtype, copy=True)


def order_of(k: int, reuse: bool = True) -> list[str]:
    """Which phase follows each evaluation."""
    return ["ascent_step", *["descent_step"] * k] if reuse else ["ascent_step", "descent_step"] * k


def phases(optimizer: Any, grads: Evaluations, k: int, reuse: bool = True) -> None:
    """The first ``len(grads)`` phases of an outer step."""
    for phase, each in zip(order_of(k, reuse), grads, strict=False):
        give(optimizer, each)
        getattr(optimizer, phase)()


# An optimizer beside the judge


BETWEEN = Row(0.0, scale=2.0**-7, why="torch keeps this state in 8 or 11 bits and rounds it at each descent")


@dataclass
class Bout:
    """A Lookbehind and the judge, given the same gradients and compared after each phase.

    Parameters of 8 or 11 bits are lost to rounding after an outer step, whoever is right; there the judge starts each
    one from what is stored.
    """

    target: Target
    base: Base
    groups: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    grad_layout: str = "contiguous"

    def __post_init__(self) -> None:
        self.optimizer = ahead(self.target, self.base, [dict(g) for g in self.groups], **self.settings)
        assert self.optimizer.fused is self.base.fused, repr(self.optimizer)
        known = {k: v for k, v in self.settings.items() if k != "reuse_gradients"}
        self.judge = self.base.published(self.groups, **known)
        self.k, self.reuse = self.settings.get("k", 2), self.settings.get("reuse_gradients", True)
        self.params = parameters_of(self.optimizer)
        self.cycles = 0

    def cycle(self, absent: Sequence[int] = ()) -> None:
        """One outer step of both with random gradients; the parameters in ``absent`` have none."""
        self.cycles += 1
        if any(p.dtype in LOW for p in self.params):
            self.judge.slow = [p.detach().cpu().double().clone() for p in self.params]
        order = order_of(self.k, self.reuse)
        given = [self._draw(absent) for _ in order]
        full = [given[(j + 1) // 2] for j in range(2 * self.k)] if self.reuse else given
        self.judge.cycle(lambda j, q: full[j])
        for j, (phase, grads) in enumerate(zip(order, given, strict=True)):
            for p, g in zip(self.params, grads, strict=True):
                p.grad = g
            getattr(self.optimizer, phase)()
            last = j == len(order) - 1
            at = j if self.reuse else j // 2  # what the parameters hold now: perturbed weights of this number
            self._compare(self.judge.slow if last else self.judge.trace[at], f"cycle {self.cycles}, {phase} {j}")
        self._compare_states()

    def _draw(self, absent: Sequence[int]) -> list[Tensor | None]:
        whole = randoms([tuple(p.shape) for p in self.params])
        return [
            None if i in absent else lay(g.to(p.device, p.dtype), self.grad_layout if g.ndim == 4 else "contiguous")
            for i, (p, g) in enumerate(zip(self.params, whole, strict=True))
        ]

    def _compare(self, expected: Sequence[Tensor], where: str) -> None:
        largest = max((float(t.abs().max()) for t in expected if t.numel()), default=0.0)
        for p, wanted in zip(self.params, expected, strict=True):
            close(p, wanted, tolerances.STORED[p.dtype], f"{where}, {tuple(p.shape)}", largest)

    def _compare_states(self) -> None:
        states = self.optimizer.base_optimizer.state
        expected = self.judge.base.states()
        largest: dict[str, float] = {}
        for key, value in ((k, v) for s in expected for k, v in s.items()):
            largest[key] = max(largest.get(key, 0.0), float(value.abs().max()) if value.numel() else 0.0)
        for p, wanted in zip(self.params, expected, strict=True):
            found = {k: v for k, v in states.get(p, {}).items() if isinstance(v, Tensor)}
            assert found.keys() == wanted.keys(), f"cycle {self.cycles}, {tuple(p.shape)}"
            for key, value in found.items():
                where = f"cycle {self.cycles}, {tuple(p.shape)}: {key}"
                row = BETWEEN if value.dtype in LOW else tolerances.STATE[value.dtype]
                row = tolerances.COSINE[value.dtype] if key == "correlation" else row
                close(value, wanted[key], row, where, largest[key])


def two_groups(
    target: Target,
    base: Base,
    dtype: torch.dtype = torch.float64,
    layout: str = "contiguous",
    shapes: Sequence[tuple[int, ...]] | None = None,
) -> list[dict[str, Any]]:
    """Parameters of every shape in two groups; the second has a rate and a decay of its own."""
    params = [
        target.parameter(t, dtype, layout if t.ndim == 4 or (t.ndim and layout != "channels_last") else "contiguous")
        for t in randoms(shapes or shapes_for(target))
    ]
    second = {"lr": 2 * base.options["lr"], "weight_decay": 0.02}
    if "momentum" in base.options:
        second["momentum"] = 0.5
    return [{"params": params[::2]}, {"params": params[1::2], **second}]


# Networks


def network(dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).to(device, dtype)


def batch(step: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(8, 6, generator=generator)
    return x.to(device, dtype), x[:, :2].to(device, dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    p = next(model.parameters())
    x, y = batch(step, p.dtype, p.device.type)
    return nn.functional.mse_loss(model(x), y)


@dataclass
class Run:
    """A network and its optimizer; ``spoil`` sees the network after each backward, with the evaluation's number."""

    target: Target
    base: Base
    settings: Mapping[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    make: Callable[..., nn.Module] = network
    cls: Any = torsion.Lookbehind

    def __post_init__(self) -> None:
        self.model = self.make(self.dtype, self.target.device)
        self.optimizer = self.target.optimizer(
            self.cls, self.base.build(self.model.named_parameters()), **self.settings
        )
        self.k, self.reuse = self.settings.get("k", 2), self.settings.get("reuse_gradients", True)
        if self.cls is torsion.SAM:
            self.k = 1
        self.spoil: Callable[[nn.Module, int], None] = lambda model, j: None
        self.done = 0
        self.losses: list[Tensor] = []

    def closure(self, step: int) -> Callable[[], Tensor]:
        self.done, self.losses = 0, []

        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = loss_of(self.model, step)
            loss.backward()
            self.spoil(self.model, self.done)
            self.done += 1
            self.losses.append(loss.detach())
            return loss

        return closure

    def step(self, step: int) -> Any:
        return self.optimizer.step(self.closure(step))

    def by_phases(self, step: int) -> None:
        closure = self.closure(step)
        for phase in order_of(self.k, self.reuse):
            closure()
            getattr(self.optimizer, phase)()

    @property
    def evaluations(self) -> int:
        return len(order_of(self.k, self.reuse))

    def everything(self) -> list[Tensor]:
        return everything(self.optimizer)

    def values(self) -> list[Tensor]:
        return values_of(self.optimizer)


def judged(run: Run) -> tuple[Published, Callable[[int], None]]:
    """The judge of a run that has not begun, and a function that takes an outer step with it."""
    model = copy.deepcopy(run.model).double().cpu()
    params = list(model.parameters())
    settings = {k: v for k, v in run.settings.items() if k != "reuse_gradients"}
    group = {"params": params, "param_names": [name for name, _ in model.named_parameters()]}
    judge = run.base.published([group], **settings)

    def gradients(step: int) -> Callable[[int, Sequence[Tensor]], list[Tensor]]:
        def at(j: int, q: Sequence[Tensor]) -> list[Tensor]:
            with torch.no_grad():
                for p, v in zip(params, q, strict=True):
                    p.copy_(v)
            return list(torch.autograd.grad(loss_of(model, step), params))

        return at

    return judge, lambda step: judge.cycle(gradients(step))
