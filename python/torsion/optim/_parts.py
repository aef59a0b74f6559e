"""What a step needs on each device: flat scalar state, and the launch table or the lists of a back end."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torsion.ops import _dispatch, _native
from torsion.ops._frame import SHARED, Step
from torsion.ops._rules import Rule
from torsion.optim._perturbation import NoiseRows, Perturbation

KINDS = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
STOCHASTIC_KINDS = {torch.bfloat16: 4, torch.float16: 5}


class Flat:
    """Counters and cosines of one device, each kind in one tensor; the optimizer's state holds views of them."""

    def __init__(self, device: torch.device, slots: int, scopes: int, dtype: torch.dtype) -> None:
        self.shared = torch.zeros(scopes, len(SHARED), dtype=dtype, device=device)
        self.shared[:, 2] = 0.5
        self.steps = torch.zeros(slots, dtype=torch.float32, device=device)
        self.status = torch.zeros(4, dtype=torch.int64, device=device)

    def fits(self, slots: int, scopes: int, dtype: torch.dtype) -> bool:
        """Whether the tensors have these sizes."""
        return self.steps.numel() == slots and self.shared.shape[0] == scopes and self.shared.dtype == dtype

    def row_of(self, correlation: object) -> int | None:
        """Number of the row of ``shared`` that ``correlation`` is a view of."""
        if not isinstance(correlation, Tensor) or not self.shared.numel() or correlation.device != self.shared.device:
            return None
        scope, rest = divmod(
            correlation.data_ptr() - self.shared.data_ptr(), self.shared.stride(0) * self.shared.element_size()
        )
        return scope if not rest and 0 <= scope < self.shared.shape[0] else None

    def restart(self, scope: int) -> None:
        """Give a scope the values it started with."""
        self.shared[scope].zero_()
        self.shared[scope, 2] = 0.5

    def grad_norm(self) -> Tensor:
        """Norm of all gradients in the last step: 0-dim float64."""
        return self.status[1:2].view(torch.float64).reshape(()).clone()


@dataclass(slots=True)  # a thousand of them are made at once
class Member:
    """One parameter that takes part in a step, with tensors as the kernels see them: local and dense."""

    slot: int
    group: int
    scope: int
    param: Tensor
    grad: Tensor
    states: list[Tensor]
    stochastic: bool
    weight: float = 1.0
    key: int = 0
    write_back: Tensor | None = None
    """The parameter itself where ``param`` is a dense copy of it."""
    lasso: bool = False
    noise: NoiseRows | None = None


@dataclass
class Scalars:
    """The numbers of one step, the same for all devices but for where they live."""

    hyper: Tensor
    lrs: list[Tensor]
    grad_scale: Tensor | None
    found_inf: Tensor | None
    max_grad_norm: float | None

    def on(self, device: torch.device) -> Scalars:
        """These numbers for kernels on ``device``; a learning rate on the CPU is read by the launcher."""

        def move(t: Tensor | None) -> Tensor | None:
            return None if t is None else t.to(device, torch.float32, non_blocking=True)

        lrs = [t if t.device.type == "cpu" else t.to(device, non_blocking=True) for t in self.lrs]
        return Scalars(self.hyper, lrs, move(self.grad_scale), move(self.found_inf), self.max_grad_norm)


@dataclass
class Part:
    """The members of a step on one device."""

    rule: Rule
    backend: str
    flat: Flat
    members: list[Member]
    n_groups: int
    perturbation: Perturbation | None = None
    table: Any = None
    workspace: Tensor | None = None
    written: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Build the launch table of a compiled back end."""
        self.copies = [m for m in self.members if m.write_back is not None]
        self.written = [m.param if m.write_back is None else m.write_back for m in self.members]
        self.written += [t for m in self.members for t in m.states]
        self.written += [self.flat.shared, self.flat.steps, self.flat.status]
        if self.backend not in ("cpu", "cuda"):
            return
        members = self.members
        streams: list[Iterable[Tensor]] = [(m.param for m in members), (m.grad for m in members)]
        streams += [[m.states[k] for m in members] for k in range(len(self.rule.states))]
        self.table = _native.plan.Table()
        self.table.build(
            pointers=[array("Q", (t.data_ptr() for t in stream)) for stream in streams],
            numel=array("q", (m.param.numel() for m in members)),
            kinds=[(KINDS | STOCHASTIC_KINDS if m.stochastic else KINDS)[m.param.dtype] for m in members],
            scopes=[m.scope for m in members],
            groups=[m.group for m in members],
            slots=[m.slot for m in members],
            weights=[m.weight for m in members],
            keys=[m.key for m in members],
            n_scopes=self.flat.shared.shape[0],
            n_groups=self.n_groups,
            scaled=[int(m.lasso) for m in members],
            noise=[[] if m.noise is None else m.noise.packed() for m in members],
        )
        name = self.rule.name if self.perturbation is None else f"{self.rule.name}_demp"
        self.op = getattr(torch.ops.torsion, f"{name}_planned_").default
        if self.backend == "cuda":
            size = self.table.workspace_bytes(name)
            self.workspace = torch.empty(size, dtype=torch.uint8, device=self.flat.shared.device)

    def forget_tensors(self) -> None:
        """Drop the gradients: from now on the table's pointers, which the watch keeps true, stand for them."""
        self.members = []

    def whole(self, scalars: Scalars) -> None:
        """One step over this part alone."""
        self._bump_versions()
        if self.table is None:
            _dispatch.apply_(self.rule, self._step(scalars), None, self.backend)
        else:
            self._planned(scalars, 0, None)
        self._write_back()

    def reduce(self, scalars: Scalars) -> Tensor:
        """First half of a split step: this part's sums, float64 ``[S + 1, 3]``."""
        if self.table is None:
            return _dispatch.reduce(self.rule, self._step(scalars), self.backend)
        rows = self.flat.shared.shape[0] + 1
        sums = torch.empty(rows, 3, dtype=torch.float64, device=self.flat.shared.device)
        self._planned(scalars, 1, sums)
        return sums

    def apply_(self, scalars: Scalars, sums: Tensor) -> None:
        """Second half: continue from the sums over all parts and ranks."""
        self._bump_versions()
        if self.table is None:
            _dispatch.apply_(self.rule, self._step(scalars), sums, self.backend)
        else:
            self._planned(scalars, 2, sums)
        self._write_back()

    def _planned(self, s: Scalars, phase: int, sums: Tensor | None) -> None:
        flat, demp = self.flat, self.perturbation
        more = () if demp is None else (demp.numbers(flat.shared.device), demp.seed_of_op)
        self.op(
            self.table.address, flat.shared, flat.steps, flat.status, s.hyper, s.lrs, s.grad_scale, s.found_inf,
            s.max_grad_norm, phase, sums, self.workspace, *more,
        )  # fmt: skip

    def _step(self, s: Scalars) -> Step:
        return step_of(self.rule, self.members, self.flat, s)

    def _bump_versions(self) -> None:
        # The kernels write behind autograd's back. Before the update, because after it a thousand version counters
        # have left the cache.
        torch.autograd.graph.increment_version(self.written)

    def _write_back(self) -> None:
        for m in self.copies:
            m.write_back.copy_(m.param)  # type: ignore[union-attr]


def step_of(rule: Rule, members: Sequence[Member], flat: Flat, s: Scalars) -> Step:
    """The lists a back end in Python takes."""
    return Step(
        params=[m.param for m in members],
        grads=[m.grad for m in members],
        states=[[m.states[k] for m in members] for k in range(len(rule.states))],
        shared=flat.shared,
        steps=flat.steps,
        status=flat.status,
        hyper=s.hyper,
        lrs=s.lrs,
        scopes=[m.scope for m in members],
        groups=[m.group for m in members],
        slots=[m.slot for m in members],
        grad_scale=s.grad_scale,
        found_inf=s.found_inf,
        max_grad_norm=s.max_grad_norm,
        weights=[m.weight for m in members],
        keys=[m.key for m in members],
    )
