"""From an optimizer's parameters to members of a step: checks, layouts, scalars in one tensor per device."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from torsion.ops._rules import Rule
from torsion.optim import _checks, _layout, _sharding
from torsion.optim._parts import Flat, Member


class Planning:
    """What a step must know of the parameters and state of an optimizer with TAM's kind of state."""

    param_groups: list[dict[str, Any]]
    state: Any
    _rule: ClassVar[Rule]
    _flats: dict[torch.device, Flat]
    _mesh: _sharding.Mesh | None

    def _all(self) -> Iterator[tuple[int, int, int, Tensor]]:
        """(slot, group, position in the group, parameter) of every parameter, in order."""
        slot = 0
        for g, group in enumerate(self.param_groups):
            for i, p in enumerate(group["params"]):
                yield slot, g, i, p
                slot += 1

    def _name(self, g: int, i: int) -> str:
        """The parameter's name if it was given, else "group.index"."""
        names = self.param_groups[g].get("param_names")
        return str(names[i]) if names else f"{g}.{i}"

    def _describe(self, g: int, i: int) -> str:
        return self._name(g, i) if self.param_groups[g].get("param_names") else f"parameter {i} of group {g}"

    def _scope_of(self, slot: int, group: int) -> int:
        return {"global": 0, "group": group, "tensor": slot}[self.param_groups[0]["scope"]]

    def _scopes(self) -> int:
        everyone = sum(len(group["params"]) for group in self.param_groups)
        return {"global": 1, "group": len(self.param_groups), "tensor": everyone}[self.param_groups[0]["scope"]]

    def _ensure_flats(self) -> None:
        """Have one :class:`Flat` per device that the state's scalars are views of; rebuild from the state if not."""
        everyone = list(self._all())
        slots = len(everyone)
        scopes = self._scopes()
        dtype = torch.float64 if any(p.dtype == torch.float64 for *_, p in everyone) else torch.float32
        devices = {p.device for *_, p in everyone}
        fit = set(self._flats) == devices and all(f.fits(slots, scopes, dtype) for f in self._flats.values())
        if fit and all(self._is_view(slot, g, p) for slot, g, _, p in everyone if self.state.get(p)):
            return
        old = self._flats
        self._flats = {}
        for device in devices:
            self._flats[device] = flat = Flat(device, slots, scopes, dtype)
            if device in old:
                flat.status.copy_(old[device].status)
        filled: set[tuple[torch.device, int]] = set()
        for slot, g, _, p in everyone:
            if self.state.get(p):
                self._adopt(slot, g, p, filled, list(old.values()))

    def _is_view(self, slot: int, g: int, p: Tensor) -> bool:
        flat, state = self._flats[p.device], self.state[p]
        step, correlation = state.get("step"), state.get("correlation")
        return (
            isinstance(step, Tensor)
            and isinstance(correlation, Tensor)
            and step.data_ptr() == flat.steps.data_ptr() + 4 * slot
            and correlation.data_ptr()
            == flat.shared.data_ptr() + flat.shared.element_size() * flat.shared.stride(0) * self._scope_of(slot, g)
        )

    def _adopt(self, slot: int, g: int, p: Tensor, filled: set[tuple[torch.device, int]], old: list[Flat]) -> None:
        """Copy a parameter's scalars into the flats and put views of them in their place."""
        state, scope = self.state[p], self._scope_of(slot, g)
        step, correlation = state.get("step"), state.get("correlation")
        for device, flat in self._flats.items():
            if (device, scope) not in filled and correlation is not None:
                filled.add((device, scope))
                row = next((f.shared[r] for f in old if (r := f.row_of(correlation)) is not None), None)
                if row is not None:  # the scope stays, its row moves: groups were added
                    flat.shared[scope].copy_(row, non_blocking=True)
                else:
                    flat.shared[scope, 0].copy_(torch.as_tensor(correlation), non_blocking=True)
                    flat.shared[scope, 2].copy_((1 + flat.shared[scope, 0]) / 2)
        flat = self._flats[p.device]
        flat.steps[slot].copy_(torch.as_tensor(1.0 if step is None else step).reshape(()), non_blocking=True)
        rest = {k: v for k, v in state.items() if k not in ("step", "correlation")}
        state.clear()
        state.update({"step": flat.steps[slot], **rest, "correlation": flat.shared[scope, 0]})

    def _make_states(self, active: list[tuple[int, int, int, Tensor]]) -> None:
        """Give each parameter that has none its state; it adopts the cosine of its scope where others have state."""
        alive = {self._scope_of(slot, g) for slot, g, _, p in self._all() if self.state.get(p)}
        for slot, g, _, p in active:
            if self.state[p]:
                continue
            scope = self._scope_of(slot, g)
            if scope not in alive:
                alive.add(scope)
                for flat in self._flats.values():
                    flat.restart(scope)
            flat = self._flats[p.device]
            flat.steps[slot].zero_()  # not new where the user deleted the parameter's state
            dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
            zeros = {
                key: torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format) for key in self._rule.states
            }
            self.state[p].update({"step": flat.steps[slot], **zeros, "correlation": flat.shared[scope, 0]})

    def _member(self, slot: int, g: int, i: int, p: Tensor, with_states: bool = True) -> Member:
        """One parameter as the kernels will see it; copies where its layout asks for them."""
        name, group, state = self._describe(g, i), self.param_groups[g], self.state[p] if with_states else {}
        param, grad = _sharding.local(p), _sharding.local(_sharding.matching(p, self._gradient(p)))
        write_back = None
        if not _layout.is_dense(param):
            write_back, param = param, param.detach().clone(memory_format=torch.contiguous_format)
        grad = _layout.laid_out_as(grad.to(param.dtype), param)
        states = []
        for key in self._rule.states if with_states else ():
            dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
            held = _sharding.matching(p, state[key]).to(device=param.device, dtype=dtype)
            value = _sharding.local(held)
            fitted = _layout.laid_out_as(value, param)
            if fitted is not value:
                if value is not held:
                    raise ValueError(f"{name}: the local part of {key!r} lies in memory otherwise than its parameter")
                held = fitted
            state[key] = held
            states.append(fitted)
        stochastic = bool(group.get("stochastic_rounding", False))
        member = Member(slot, g, self._scope_of(slot, g), param, grad, states, stochastic)
        member.write_back = write_back
        if self._mesh is not None:
            member.weight = self._mesh.weight(p)
            member.key = self._mesh.first_element(p) if member.stochastic else 0
        return member

    def _active(self) -> list[tuple[int, int, int, Tensor]]:
        """The parameters that have a gradient, after every check that needs no state changed."""
        active = [(slot, g, i, p) for slot, g, i, p in self._all() if p.grad is not None]
        for _, g, i, p in active:
            name = self._describe(g, i)
            _checks.parameter(name, p)
            _checks.gradient(name, p, p.grad)  # type: ignore[arg-type]
            _checks.state(name, p, self.state.get(p), self._rule.states)
        filled = [entry for entry in active if _sharding.local(entry[3]).numel()]
        _checks.distinct(
            array("Q", (_sharding.local(p).data_ptr() for *_, p in filled)),
            lambda k: self._describe(*filled[k][1:3]),
            "shares memory; make both one Parameter",
        )
        self._check_devices(active)
        return active

    def _check_devices(self, active: list[tuple[int, int, int, Tensor]]) -> None:
        _checks.one_device_type([p for *_, p in active])

    def _gradient(self, p: Tensor) -> Tensor:
        """What a pass takes as the gradient of ``p``."""
        assert p.grad is not None
        return p.grad
