"""Passes over the parameters of a Lookbehind outer step: planned once, launched until something about them changes."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from torsion.ops import _backends, _native
from torsion.ops._cycle import stream_names
from torsion.optim import _layout, _sharding
from torsion.optim._cycle import Cycle, Settings, asam_scaled
from torsion.optim._cycle_parts import Buffers, CyclePart, Pass
from torsion.optim._parts import Member

_NAN = float("nan")


class PassCycle(Cycle):
    """An outer step whose ascents and interpolation are the passes of ``csrc/rules/lookbehind.h``.

    Subclasses say who descends, and give :attr:`_base`: the parameters as kernels see them.
    """

    _base: Any
    """A :class:`torsion.optim._planning.Planning`."""

    def __init__(self, base: Optimizer, settings: Settings) -> None:
        """Everything waits for the first phase."""
        super().__init__(base, settings)
        self._forget()
        self._buffers: dict[Tensor, Buffers] = {}
        self._taking_part: list[int] = []

    def _forget(self) -> None:
        self._watch: Any = None
        self._parts: list[CyclePart] = []
        self._complete = False
        self._structure: object = None
        self._numbers: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    @abstractmethod
    def _blends(self) -> bool:
        """Whether the interpolation is a pass of its own."""

    # Launching

    def _suffix(self) -> str:
        return "/asam" if self.settings.asam else ""

    def _call(self, rule: str, route: dict[str, str], found_inf: Tensor | None, opens: bool = False) -> Pass:
        """The pass ``rule``, with the fast weights where ``route`` says."""
        of_base, of_none = self._hyper()
        descends = "descent" in rule
        groups = self.base.param_groups
        return Pass(
            rule=rule,
            streams=tuple(route.get(name, name) for name in stream_names(rule, self._base._rule)),
            hyper=of_base if descends else of_none,
            lrs=[g["lr"] for g in groups if isinstance(g["lr"], Tensor)] if descends else [],
            found_inf=None if found_inf is None else found_inf.reshape(()),
            max_grad_norm=groups[0].get("max_grad_norm") if descends else None,
            opens=opens,
        )

    def _run(self, parts: list[CyclePart], call: Pass) -> None:
        if len(parts) == 1 and self._base._mesh is None:
            parts[0].whole(call)
        elif parts:
            self._apply(parts, call, self._sums(parts, call))

    def _sums(self, parts: list[CyclePart], call: Pass) -> Tensor:
        """Sums of a pass over all devices and ranks, on the first device; NaN where ``found_inf`` says so."""
        mesh = self._base._mesh
        total = parts[0].reduce(call)
        for part in parts[1:]:
            total = total + part.reduce(call).to(total.device, non_blocking=True)
        if call.found_inf is not None:  # on one rank it must stop all
            total = torch.where(call.found_inf.to(total.device) != 0, _NAN, total)
        if mesh is not None:
            mesh.all_reduce_(total)
        return total

    def _apply(self, parts: list[CyclePart], call: Pass, total: Tensor) -> None:
        for part in parts:
            part.apply_(call, total.to(part.flat.shared.device, non_blocking=True))

    def _hyper(self) -> tuple[Tensor, Tensor]:
        """The groups' numbers with the cycle's behind them, for passes with and without the base."""
        numbers = self._base._numbers()
        if self._numbers is None or self._numbers[0] is not numbers:
            s = self.settings
            alpha = 1.0 if s.alpha == "adaptive" else float(s.alpha)  # used where k = 1: there f_1 is f_k, the cosine 1
            own = torch.tensor([s.rho, s.eta, alpha], dtype=torch.float64).expand(len(numbers), 3)
            common = numbers[:, :6].clone()
            common[:, 0] = 0.0  # a NaN would ask for a rate in a tensor
            self._numbers = numbers, torch.cat([numbers, own], 1), torch.cat([common, own], 1)
        return self._numbers[1:]

    # Planning

    def _ready(self, *, opens: bool, with_states: bool) -> list[CyclePart]:
        """The parts of this phase; planned anew when something about the parameters has changed."""
        base = self._base
        base._numbers()  # checks what the user may have edited, draws seeds
        holds = (
            self._watch is not None
            and self._structure is base._structure
            and (self._complete or not with_states)
            and self._watch.holds(self.base.param_groups, base.state)
        )
        if holds:
            return self._parts
        self._watch, self._parts = None, []
        active = base._active()
        if opens:
            self._taking_part = [slot for slot, *_ in active]
        else:
            self._check_the_same_take_part(active)
        parts = self._plan(active, opens, with_states)
        if self._watch is not None:
            self._parts = parts
        return parts

    def _check_the_same_take_part(self, active: list[tuple[int, int, int, Tensor]]) -> None:
        now, then = {slot for slot, *_ in active}, set(self._taking_part)
        for slot, g, i, _ in self._base._all():
            if (slot in now) != (slot in then):
                was, has = ("a", "none now") if slot in then else ("no", "one now")
                raise RuntimeError(
                    f"{self._base._describe(g, i)}: had {was} gradient when the outer step began and has {has}; every "
                    "backward of an outer step must reach the same parameters"
                )

    def _plan(self, active: list[tuple[int, int, int, Tensor]], opens: bool, with_states: bool) -> list[CyclePart]:
        base = self._base
        if not active:
            return []
        sharded = any(_sharding.is_dtensor(p) for *_, p in active)
        base._mesh = _sharding.Mesh([p for *_, p in active]) if sharded else None
        base._ensure_flats()
        has_state = all(base.state.get(p) for *_, p in active)
        complete = with_states or (has_state and bool(base._rule.states))
        if with_states:
            base._make_states(active)
        parts = self._build(active, opens, complete)
        self._complete, self._structure = complete, base._structure
        self._watch = self._watch_parts(parts, active)
        return parts

    def _build(self, active: list[tuple[int, int, int, Tensor]], opens: bool, complete: bool) -> list[CyclePart]:
        base = self._base
        members: dict[torch.device, list[Member]] = defaultdict(list)
        scaled: dict[torch.device, list[bool]] = defaultdict(list)
        for slot, g, i, p in active:
            member = base._member(slot, g, i, p, complete)
            self._provide_buffers(base._describe(g, i), p, member, opens)
            members[p.device].append(member)
            scaled[p.device].append(asam_scaled(self.base.param_groups[g], i, p))
        owners = {slot: p for slot, _, _, p in active}
        return [
            CyclePart(
                rule=base._rule,
                backend=_backends.choose(device.type, self.settings.backend)[0],
                flat=base._flats[device],
                members=found,
                buffers=[self._buffers[owners[m.slot]] for m in found],
                scaled=scaled[device],
                n_groups=len(self.base.param_groups),
                settings=self.settings,
                complete=complete,
                blends=self._blends,
            )
            for device, found in members.items()
        ]

    def _provide_buffers(self, name: str, p: Tensor, member: Member, opens: bool) -> None:
        held = self._buffers.get(p)
        if held is not None and held.fits(member.param):
            return
        if not opens:
            raise RuntimeError(f"{name}: its shape, dtype or memory layout changed inside an outer step")
        self._buffers[p] = Buffers.like(member.param, self.settings)

    def _watch_parts(self, parts: list[CyclePart], active: list[tuple[int, int, int, Tensor]]) -> Any:
        """A watch that tells whether the parts still hold, or None where they must be planned for every phase."""
        grads = {m.slot: m.grad for part in parts for m in part.members}
        planned = all(part.table is not None and not part.copies for part in parts)
        own = all(_sharding.local(p.grad).data_ptr() == grads[slot].data_ptr() for slot, *_, p in active)  # type: ignore[arg-type]
        if not (planned and own):
            return None
        tables = {part.flat.shared.device: part.table for part in parts}
        watch = _native.plan.Watch()
        keys = self._base._rule.states if self._complete else ()
        for slot, _, _, p in self._base._all():
            state = self._base.state.get(p)
            states = [state[key] for key in keys if state and key in state]
            streams = [p, p.grad, *states] if slot in grads else []
            watch.add(p, state, streams, tables.get(p.device), slot, _sharding.is_dtensor(p))
        watch.seal(self._base.state)
        for part in parts:
            part.forget_gradients()
        return watch

    # Outside the phases

    def _open_buffers(self) -> list[tuple[Tensor, Buffers]]:
        slots = set(self._taking_part)
        return [(_sharding.local(p).detach(), self._buffers[p]) for slot, *_, p in self._base._all() if slot in slots]

    @torch.no_grad()
    def abandon(self) -> None:
        """See :class:`Cycle`."""
        for p, buffers in self._open_buffers():
            # One that no longer fits is what the error being handled is about.
            if p.shape == buffers.slow.shape and not _layout.may_overlap(p):
                p.copy_(buffers.slow)

    @torch.no_grad()
    def show_slow(self) -> None:
        """See :class:`Cycle`."""
        for p, buffers in self._open_buffers():
            held = p.clone()
            p.copy_(buffers.slow)
            if buffers.perturbed is None:
                buffers.slow.copy_(held)

    @torch.no_grad()
    def hide_slow(self) -> None:
        """See :class:`Cycle`."""
        for p, buffers in self._open_buffers():
            held = p.clone()
            p.copy_(buffers.slow if buffers.perturbed is None else buffers.perturbed)
            if buffers.perturbed is None:
                buffers.slow.copy_(held)

    def skipped(self) -> Tensor:
        """See :class:`Cycle`."""
        flat = next(iter(self._base._flats.values()), None)
        if flat is None:
            device = next((p.device for *_, p in self._base._all()), None)
            return torch.zeros((), dtype=torch.int64, device=device)
        count: Tensor = flat.status[0].clone()
        return count
