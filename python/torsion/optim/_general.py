"""An outer step over any base optimizer: its own ``step()`` descends, between passes that ascend and interpolate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torsion.ops._frame import COMMON_HYPER
from torsion.ops._rules import Rule
from torsion.optim._bases import TorchPlanning
from torsion.optim._cycle import Settings
from torsion.optim._cycle_parts import Buffers, CyclePart
from torsion.optim._parts import Member
from torsion.optim._passes import PassCycle


class _AnyPlanning(TorchPlanning):
    """The parameters of an optimizer of which nothing else is known."""

    _rule = Rule("none", (), COMMON_HYPER)

    reads_gradients = True

    @property
    def state(self) -> dict[Tensor, Any]:
        """Nothing: what the base keeps is its own business."""
        return {}

    def _row(self, group: dict[str, Any]) -> tuple[float, ...]:
        return 0.0, 0.0, float(bool(group.get("maximize"))), 0.0, 0.0

    def _numbers(self) -> Tensor:
        rows = [(0.0, *self._row(g)) for g in self.param_groups]
        if rows != self._seen:
            self._hyper, self._seen = torch.tensor(rows, dtype=torch.float64), rows
        return self._hyper

    def _check_devices(self, active: list[tuple[int, int, int, Tensor]]) -> None:
        pass  # a descent waits for the device in any case

    def _member(self, slot: int, g: int, i: int, p: Tensor, with_states: bool = False) -> Member:
        member = super()._member(slot, g, i, p, False)
        member.stochastic = False
        return member

    def _gradient(self, p: Tensor) -> Tensor:
        return super()._gradient(p) if self.reads_gradients else p  # an interpolation does not look at it


class GeneralCycle(PassCycle):
    """The base as a black box.

    The parameters hold the perturbed weights between the phases and the fast ones while the base steps. One host sync
    per descent decides whether it does; an ascent waits for nothing. bfloat16 and float16: q is kept in float32, and
    the interpolation rounds once, but f is what the base makes of a parameter of that dtype.
    """

    fused = False
    _blends = True

    def __init__(self, base: Optimizer, settings: Settings) -> None:
        """Nothing is allocated before the first phase."""
        super().__init__(base, settings)
        self._base: Any = _AnyPlanning(base)
        self._given_up = False  # the host knows of the skip

    def ascend(self, *, opens: bool, found_inf: Tensor | None) -> None:
        """See :class:`Cycle`."""
        parts = self._ready(opens=opens, with_states=False)
        if opens:
            self._given_up = False
        elif self._given_up:
            return
        rule = ("opening_ascent" if opens else "ascent") + self._suffix()
        self._run(parts, self._call(rule, {}, found_inf, opens))

    def descend(self, i: int, *, ascends: bool, last: bool, found_inf: Tensor | None) -> None:
        """See :class:`Cycle`."""
        parts = self._ready(opens=False, with_states=False)
        if self._given_up:
            return
        if parts:
            # Without an ascent to make, the sums of one tell whether the gradients are finite.
            call = self._call("ascent" + (self._suffix() if ascends else ""), {}, found_inf)
            total = self._sums(parts, call)
            self._given_up = self._skips(parts, total)
            if ascends or self._given_up:  # before the base, which may change p.grad in its step
                self._apply(parts, call, total)
            if self._given_up:
                return
        self._base_step(i, last)
        if last:
            self._interpolate()

    def _skips(self, parts: list[CyclePart], total: Tensor) -> bool:
        """Whether this phase or one before it is skipped; waits for the device."""
        before = parts[0].flat.status[2].to(total.device) != 0
        return bool((before | ~torch.isfinite(total[-1]).all()).item())

    def _base_step(self, i: int, last: bool) -> None:
        """Have the base step from the fast weights; leave the result in ``fast``, after the last in the parameter."""
        weights = self._open_buffers()
        for p, b in weights:
            if last or b.perturbed is not None:
                p.copy_(_fast(b, i))
            elif i == 1:
                _fast(b, 2).copy_(p)
                p.copy_(b.slow)
            else:
                _exchange(p, _fast(b, i))
        self.base.step()
        if last:
            return
        for p, b in self._open_buffers():
            fast = _fast(b, 2)
            if b.perturbed is None:
                _exchange(p, fast)
            else:
                fast.copy_(p)
                p.copy_(b.perturbed)
            if i == 1 and b.first is not None:
                b.first.copy_(fast)

    def _interpolate(self) -> None:
        """Move the slow weights; the last fast ones are in the parameters."""
        for p, b in self._open_buffers():
            if b.perturbed is not None:
                b.perturbed.copy_(p)
        settings = self.settings
        adaptive = settings.alpha == "adaptive" and settings.k > 1
        route = {"source": "perturbed", "first": "first" if settings.keeps_first else "fast" if adaptive else "slow"}
        self._run(self._parts_to_blend(), self._call("blend/adaptive" if adaptive else "blend", route, None))

    def _parts_to_blend(self) -> list[CyclePart]:
        """The parts as they are after the base's step, which may have given a parameter another storage."""
        if self._watch is not None and self._watch.holds(self.base.param_groups, self._base.state):
            return self._parts
        self._base.reads_gradients = False
        try:
            active = [entry for entry in self._base._all() if entry[0] in set(self._taking_part)]
            return self._build(active, opens=False, complete=False)
        finally:
            self._base.reads_gradients = True


def _fast(b: Buffers, i: int) -> Tensor:
    """Where the fast weights before descent i are."""
    if i == 1:
        return b.slow
    assert b.fast is not None
    return b.fast


def _exchange(a: Tensor, b: Tensor) -> None:
    """Exchange the contents of two tensors of one dtype."""
    held = a.clone()
    a.copy_(b)
    b.copy_(held)
