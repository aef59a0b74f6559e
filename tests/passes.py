"""Passes of a Lookbehind cycle for tests: builders, runners, and a judge in float64.

The judge is written from the equations with Python's branches, apart from ``torsion.reference``. It sees one pass at a
time, where that of ``published.py`` sees outer steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tolerances
import torch
from helpers import Target
from tolerances import close
from torch import Tensor

from torsion.ops import _dispatch, _native
from torsion.ops import lookbehind as ops
from torsion.ops._cycle import RULES, SLOT, stream_names
from torsion.ops._frame import Phase
from torsion.ops._rules import BASES, columns

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
LOW = (BF16, F16)
NAMES = [
    *(f"{ascent}{asam}" for ascent in ("opening_ascent", "ascent") for asam in ("", "/asam")),
    *(f"descent_ascent/{base}{asam}" for base in BASES for asam in ("", "/asam")),
    *(f"{descent}/{base}" for base in BASES for descent in ("descent", "descent_blend")),
    "blend",
    "blend/adaptive",
]
"""Every pass, as ``Phase.rule`` has it."""

NUMBERS = {
    "lr": 0.05,
    "weight_decay": 0.1,
    "momentum": 0.9,
    "dampening": 0.3,
    "beta1": 0.9,
    "beta2": 0.99,
    "eps": 1e-8,
    "decay": 0.8,
    "eps_damping": 1e-8,
    "rho": 0.2,
    "eta": 0.0625,  # the kernels take it in the dtype of their maths
    "alpha": 0.3,
}
_LISTS = {
    "opening_ascent": ("perturbed", "slow"),
    "ascent": ("perturbed", "slow"),
    "descent_ascent": ("source", "target", "perturbed", "slow"),
    "descent": ("source", "target", "perturbed", "slow"),
    "descent_blend": ("source", "slow"),
    "blend": ("source", "slow", "first"),
}


def base_of(rule: str) -> Any:
    """The rule of the base, or None."""
    return BASES[rule.split("/")[1]] if "descent" in rule else None


def norm_column(rule: str) -> int:
    """Which sum is |gradient|^2."""
    base = base_of(rule)
    return 1 if base and base.name in ("tam", "adatam") else 0


def n_sums(rule: str) -> int:
    """How many sums a pass has."""
    base = base_of(rule)
    of_base = 0 if base is None else 1 + 2 * norm_column(rule)
    return 3 if rule.startswith("blend") else of_base + (rule.endswith("asam") or base is None)


def wide(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


def phase_of(
    rule: str, tensors: Sequence[tuple[Any, torch.dtype]], *groups: Mapping[str, float], **arguments: Any
) -> Phase:
    """A pass in the midst of a training over (shape, dtype); one scope and one group unless told otherwise."""
    n, base, which = len(tensors), base_of(rule), rule.partition("/")[0]

    def randoms(of_state: bool = True) -> list[Tensor]:
        return [torch.randn(shape).to(wide(t) if of_state else t) for shape, t in tensors]

    params = randoms(False)
    every = ("source", "target", "slow", "first", "perturbed")
    lists: dict[str, Any] = {name: randoms() if name in _LISTS[which] else [] for name in every}
    if lists["perturbed"]:
        # Where the parameter is a rounded copy, an outer step does not find anything in the buffer.
        found = [torch.full_like(q, torch.nan) if which == "opening_ascent" else q for q in lists["perturbed"]]
        lists["perturbed"] = [p if p.dtype == q.dtype else q for p, q in zip(params, found, strict=True)]
    states = [randoms() for _ in (base.states if base else ())]
    if len(states) == 2:
        states[1] = [t.square() for t in states[1]]
    given: dict[str, Any] = {"scopes": [0] * n, "groups": [0] * n, "slots": list(range(n)), "lrs": []} | arguments
    hyper = [[{**NUMBERS, **group}.get(name, 0.0) for name in columns(rule)] for group in groups or ({},)]
    width = 1 if which == "blend" else 3 * norm_column(rule)
    given.setdefault("shared", torch.rand(1 + max(given["scopes"], default=0), width, dtype=F64))
    given.setdefault("steps", torch.full((1 + max(given["slots"], default=0),), 3.0))
    given.setdefault("status", torch.tensor([5, 0, 0, 0]))
    given.setdefault("scaled", [i % 2 == 0 for i in range(n)])
    given.setdefault("opens", which == "opening_ascent")
    grads = [] if which == "blend" else randoms(False)
    return Phase(params, grads, states, hyper=torch.tensor(hyper, dtype=F64), rule=rule, **lists, **given)


def on(phase: Phase, device: str) -> Phase:
    """A copy of the pass on ``device``; lists that are one stay one."""
    moved: dict[int, Tensor] = {}

    def move(x: Any) -> Any:
        if isinstance(x, Tensor):
            return moved.setdefault(id(x), x.clone().to(device))
        return [move(y) for y in x] if isinstance(x, list) else x

    fields = {name: value if name == "hyper" else move(value) for name, value in vars(phase).items()}
    return Phase(**{**fields, "hyper": phase.hyper.clone()})


def lists_of(phase: Phase) -> dict[str, Sequence[Tensor]]:
    """Every list that some pass may write."""
    states = {f"states[{k}]": s for k, s in enumerate(phase.states)}
    return {"params": phase.params, **{n: getattr(phase, n) for n in ("perturbed", "slow", "target")}, **states}


def written(phase: Phase) -> list[Tensor]:
    """All that some pass may write but ``status``."""
    return [*(t for ts in lists_of(phase).values() for t in ts), phase.shared, phase.steps]


def run(phase: Phase, target: Target) -> None:
    """The pass, on the target's back end."""
    ops.run_(phase, target.backend)


def planned(phase: Phase, device: str) -> Callable[[int, Tensor | None], tuple[Any, ...]]:
    """Arguments of the planned op: for the whole pass (0), or for its first (1) or second half (2) over sums.

    The table lives as long as the function that is returned.
    """
    # The table has no place of its own for what a pass calls source and target.
    places = {"source": "fast", "target": "first"}
    table = ops._table(phase, {places.get(name, name): ts for name, ts in ops.streams_of(phase).items()})
    slots = [SLOT[places.get(name, name)] for name in stream_names(phase.rule, base_of(phase.rule))]
    workspace = None
    if device == "cuda":
        workspace = torch.empty(table.workspace_bytes("lookbehind"), dtype=torch.uint8, device="cuda")

    def arguments(half: int, sums: Tensor | None) -> tuple[Any, ...]:
        return (
            table.address, RULES[phase.rule]["number"], slots, phase.opens, phase.shared, phase.steps, phase.status,
            phase.hyper, phase.lrs, phase.found_inf, phase.max_grad_norm, half, sums, workspace,
        )  # fmt: skip

    return arguments


def halves(phase: Phase, target: Target) -> tuple[Tensor, Callable[[Tensor], None]]:
    """Its sums, and a function that does the rest from sums given to it."""
    if target.backend in ("triton", "reference"):
        sums = _dispatch.reduce_phase(phase, target.backend)
        return sums, lambda sums: _dispatch.run_phase_(phase, sums, target.backend)
    arguments, op = planned(phase, target.device), torch.ops.torsion.lookbehind_planned_
    sums = torch.empty(phase.shared.shape[0] + 1, n_sums(phase.rule), dtype=F64, device=target.device)
    op(*arguments(1, sums))
    return sums, lambda sums: op(*arguments(2, sums))


assert _native.plan is None or set(RULES) == set(NAMES)


# The judge


@dataclass
class Expected:
    """What a pass that is not skipped leaves, in float64."""

    phase: Phase
    lists: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Compute everything from the phase as it stands, on the CPU."""
        phase = self.phase = on(copy.copy(self.phase), "cpu")
        self.parts = phase.rule.split("/")
        self.base, self.asam = base_of(phase.rule), self.parts[-1] == "asam"
        rates = iter(phase.lrs)
        rows = [dict(zip(columns(phase.rule), row, strict=True)) for row in phase.hyper.tolist()]
        rows = [r | {"lr": float(next(rates))} if math.isnan(r["lr"]) else r for r in rows]
        self.of = [rows[g] for g in phase.groups]
        self.before = [float(phase.steps[slot]) for slot in phase.slots]
        self.grads = [(-1 if h["maximize"] else 1) * g.double() for h, g in zip(self.of, phase.grads, strict=False)]
        self.at = phase.params if self.parts[0] == "opening_ascent" else phase.perturbed
        self.sums = self._sums()
        self.norm = math.sqrt(float(self.sums[-1, norm_column(phase.rule)].abs()))
        limit = math.inf if phase.max_grad_norm is None else phase.max_grad_norm
        self.clip = min(1.0, limit / (self.norm + 1e-6))
        self.shared = self._shared()
        self.steps = phase.steps.double().clone()
        if self.base:
            for slot in phase.slots:
                self.steps[slot] += 1
        self.lists = {name: [t.double().clone() for t in ts] for name, ts in lists_of(phase).items()}
        for i in range(len(phase.params)):
            self._move(i)

    def _seeds(self, i: int) -> bool:
        clones = self.base and (self.base.name == "sgd_momentum" or self.of[i].get("clone", 0) != 0)
        return bool(clones) and self.before[i] == 0

    def _t(self, i: int) -> Tensor | float:
        scaled = self.asam and self.phase.scaled[i]
        return self.at[i].double().abs() + self.of[i]["eta"] if scaled else 1.0

    def _terms(self, i: int) -> list[Tensor]:
        if self.parts[0] == "blend":
            s = self.phase.slow[i].double()
            x, y = self.phase.first[i].double() - s, self.phase.source[i].double() - s
            return [(a * b).sum() * (self.parts[-1] == "adaptive") for a, b in ((x, y), (x, x), (y, y))]
        g, terms = self.grads[i], []
        if self.base and self.base.name in ("tam", "adatam"):
            m = self.phase.states[0][i].double()
            terms = [(m * g).sum(), (g * g).sum(), (m * m).sum()]
        elif self.base:
            terms = [(g * g).sum()]
        return terms if self.base and not self.asam else [*terms, (self._t(i) * g).square().sum()]

    def _sums(self) -> Tensor:
        phase = self.phase
        sums = torch.zeros(len(phase.shared) + 1, n_sums(phase.rule), dtype=F64)
        for i, scope in enumerate(phase.scopes):
            weight = phase.weights[i] if phase.weights else 1.0
            for row in {-1} if self._seeds(i) else {-1, scope}:
                sums[row] += weight * torch.stack(self._terms(i))
        return sums

    def _shared(self) -> Tensor:
        shared = self.phase.shared.double().clone()
        if not shared.shape[1]:
            return shared
        for scope in set(self.phase.scopes):
            a, b, c = self.sums[scope, :3].tolist()
            if shared.shape[1] == 3:
                b, c = c, b
            lengths = math.sqrt(b) * math.sqrt(c)
            cosine = min(1.0, max(-1.0, a / lengths)) if lengths else 0.0
            h = self.of[list(self.phase.scopes).index(scope)]
            if shared.shape[1] == 1:
                shared[scope, 0] = (1 + cosine) / 2 if self.parts[-1] == "adaptive" else h["alpha"]
                continue
            smoothed = h["decay"] * float(shared[scope, 0]) + (1 - h["decay"]) * cosine
            shared[scope] = torch.tensor([smoothed, cosine, (1 + smoothed) / 2], dtype=F64)
        return shared

    def _move(self, i: int) -> None:
        phase, which, lists = self.phase, self.parts[0], self.lists
        slow = phase.slow[i].double()
        if which == "opening_ascent":
            lists["slow"][i] = phase.params[i].double()
        fast = phase.source[i].double() if which == "blend" else None
        if self.base:
            fast, *states = getattr(self, f"_{self.base.name}")(i)
            for k, state in enumerate(states):
                lists[f"states[{k}]"][i] = state
            if lists["target"]:
                lists["target"][i] = fast
        if which.endswith("ascent"):
            length = math.sqrt(float(self.sums[-1, -1 if self.asam else norm_column(phase.rule)]))
            t = self._t(i)
            moved = self.at[i].double() + self.of[i]["rho"] * t * t * self.grads[i] / (length + 1e-16)
            lists["perturbed"][i] = lists["params"][i] = moved
        elif "blend" in which:
            alpha = self.of[i]["alpha"] if self.base else float(self.shared[phase.scopes[i], 0])
            lists["params"][i] = slow + alpha * (fast - slow)

    # Bases: new parameter and states of tensor i

    def _start(self, i: int, k: int) -> tuple[Any, ...]:
        states = [s[i].double() for s in self.phase.states[:k]]
        return self.of[i], self.phase.source[i].double(), self.grads[i], *states

    def _sgd(self, i: int) -> tuple[Tensor, ...]:
        h, theta, g = self._start(i, 0)
        return (theta - h["lr"] * (g + h["weight_decay"] * theta),)

    def _sgd_momentum(self, i: int) -> tuple[Tensor, ...]:
        h, theta, g, m = self._start(i, 1)
        g = g + h["weight_decay"] * theta
        m = g if self._seeds(i) else h["momentum"] * m + (1 - h["dampening"]) * g
        return theta - h["lr"] * (g + h["momentum"] * m if h["nesterov"] else m), m

    def _adam(self, i: int) -> tuple[Tensor, ...]:
        h, theta, g, m, v = self._start(i, 2)
        t = self.before[i] + 1
        if h["decoupled"]:
            theta = theta * (1 - h["lr"] * h["weight_decay"])
        else:
            g = g + h["weight_decay"] * theta
        m, v = h["beta1"] * m + (1 - h["beta1"]) * g, h["beta2"] * v + (1 - h["beta2"]) * g * g
        root = (v / (1 - h["beta2"] ** t)).sqrt() + h["eps"]
        return theta - h["lr"] * m / (1 - h["beta1"] ** t) / root, m, v

    def _damped(self, i: int, beta: float, theta: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h, g = self.of[i], self.clip * self.grads[i]
        force = g if h["decoupled"] else g + h["weight_decay"] * theta
        damping = h["eps_damping"] + float(self.shared[self.phase.scopes[i], 2])
        shrunk = theta * (1 - h["lr"] * h["weight_decay"]) if h["decoupled"] else theta
        return shrunk, force if self._seeds(i) else beta * m + damping * force, g

    def _tam(self, i: int) -> tuple[Tensor, ...]:
        h, theta, _, m = self._start(i, 1)
        theta, m, _ = self._damped(i, h["momentum"], theta, m)
        return theta - h["lr"] * m, m

    def _adatam(self, i: int) -> tuple[Tensor, ...]:
        h, theta, _, m, v = self._start(i, 2)
        theta, m, g = self._damped(i, h["beta1"], theta, m)
        v = h["beta2"] * v + (1 - h["beta2"]) * g * g
        corrected = v / (1 - h["beta2"] ** (self.before[i] + 1)) if h["bias_correction"] else v
        return theta - h["lr"] * m / (corrected.sqrt() + h["eps"]), m, v


def check(phase: Phase, target: Target) -> None:
    """Runs the pass on the target and compares all it leaves with the judge."""
    expected, phase = Expected(phase), on(phase, target.device)
    sums, rest = halves(phase, target)
    close(sums, expected.sums, tolerances.SUMS, "sums")
    rest(sums)
    for name, tensors in lists_of(phase).items():
        for i, (t, wanted) in enumerate(zip(tensors, expected.lists[name], strict=True)):
            dtype = phase.params[i].dtype
            noisy = expected.of[i]["stochastic"] and dtype in LOW and "blend" in phase.rule
            stored = (tolerances.STORED_STOCHASTIC if noisy else tolerances.STORED)[dtype]
            close(t, wanted, stored if name == "params" else tolerances.STATE[dtype], f"{phase.rule}: {name}[{i}]")
    close(phase.shared, expected.shared, tolerances.COSINE[phase.shared.dtype], f"{phase.rule}: shared")
    close(phase.steps, expected.steps, tolerances.EXACT, f"{phase.rule}: steps")
    skipped, _, skip, _ = phase.status.tolist()
    assert (skipped, skip) == (5, 0)
    if expected.parts[0] != "blend":
        norm, clip = phase.status.cpu().view(F64)[[1, 3]]
        close(norm, expected.norm, tolerances.SUMS, "norm")
        close(clip, expected.clip, tolerances.SUMS, "clip")
