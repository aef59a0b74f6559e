"""An optimizer that looks at its parameters once and launches the same parts until something about them changes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from torsion.ops import _backends, _native
from torsion.optim import _checks, _sharding
from torsion.optim._parts import Flat, Member, Part
from torsion.optim._perturbation import Perturbation
from torsion.optim._planning import Planning


class PlannedOptimizer(Planning, torch.optim.Optimizer):
    """Looks at the parameters once and gives :class:`Part` objects, until something about them changes."""

    _watch: Any

    def __init__(self, params: Any, defaults: dict[str, Any], backend: str | None, untaken: dict[str, object]) -> None:
        """Check everything, then let torch build the groups."""
        _checks.reject_untaken(type(self).__name__, untaken)
        if backend is not None:
            _checks.word("", "backend", backend, _backends.NAMES, "or None for the best")
        self._backend = backend
        self._perturbation: Perturbation | None = None
        self._forget()
        self._check_numbers("", defaults)
        super().__init__(_checks.not_empty(type(self).__name__, params), defaults)
        for device in {p.device.type for _, _, _, p in self._all()}:
            _backends.choose(device, backend)

    def _check_numbers(self, where: str, group: dict[str, Any]) -> None:
        """Check one group's values; subclasses add theirs."""
        _checks.rate(where, group["lr"])
        for name in ("weight_decay", "eps_damping"):
            _checks.at_least_zero(where, name, group[name])
        _checks.fraction(where, "decay", group["decay"], closed=True)
        _checks.clip_norm(where, group["max_grad_norm"])
        for name in ("decoupled_weight_decay", "maximize", "stochastic_rounding"):
            _checks.flag(where, name, group[name])
        _checks.word(where, "scope", group["scope"], _checks.SCOPES)
        _checks.word(where, "init", group.get("init", "zero"), _checks.INITS)
        _checks.seed(where, group["sr_seed"])

    def _check_settings(self, g: int) -> None:
        """Check the values of group ``g``, and that it agrees with the first group where it must."""
        group, first = self.param_groups[g], self.param_groups[0]
        self._check_numbers(f"group {g}: " if len(self.param_groups) > 1 else "", group)
        _checks.agree(g, group, first, ("scope", "init", "max_grad_norm"), "a step has one")
        if first["scope"] == "global":
            _checks.agree(g, group, first, ("decay", "eps_damping"), 'with scope="global" all groups share one cosine')

    def _check_group(self, g: int) -> None:
        """Check the values and the parameters of group ``g``."""
        self._check_settings(g)
        params = self.param_groups[g]["params"]
        for i, p in enumerate(params):
            _checks.parameter(self._describe(g, i), p)
        _checks.distinct([id(p) for p in params], lambda i: self._describe(g, i), "is given twice; list it once")
        _checks.one_device_type([*self.param_groups[0]["params"], *params])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; it joins the scope at the next step.

        Raises:
            ValueError: a value is out of range, or does not agree with the other groups where it must.
            TypeError: a value is of the wrong kind, or a parameter has a dtype the kernels do not know.
        """
        super().add_param_group(param_group)
        try:
            self._check_group(len(self.param_groups) - 1)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._draw_seeds()
        self._watch = None

    def _draw_seeds(self) -> None:
        for group in self.param_groups:
            if group["stochastic_rounding"] and group["sr_seed"] is None:
                group["sr_seed"] = int(torch.randint(2**53 - 1, ()))

    # Lasso and noise inside the step, for torsion.DemP

    def _perturb(self, perturbation: Perturbation | None) -> None:
        """Take lasso and noise into the steps to come; its numbers may change between them, None ends it."""
        self._perturbation, self._watch = perturbation, None

    def _takes_perturbation(self) -> bool:
        """Whether kernels that do so run on all parameters."""
        kinds = {p.device.type for *_, p in self._all()}
        return all(_backends.choose(kind, self._backend)[0] in ("cpu", "cuda") for kind in kinds)

    def _takes_noise(self, p: Tensor) -> bool:
        """Whether the kernels can add noise to ``p``: its elements lie in order, and their rounding is unbiased."""
        group = next(g for g in self.param_groups if any(p is q for q in g["params"]))
        rounds = p.dtype in (torch.float32, torch.float64) or group["stochastic_rounding"]
        return bool(rounds) and p.is_contiguous() and not _sharding.is_dtensor(p)

    def _forget(self) -> None:
        """Drop everything that can be derived from groups and state."""
        self._watch = None
        self._parts: list[Part] = []
        self._mesh: _sharding.Mesh | None = None
        self._flats: dict[torch.device, Flat] = {}
        self._stepped = False
        self._settings: object = None
        self._hyper: Tensor | None = None
        self._structure: object = None

    def _plan(self) -> list[Part]:
        """Look at every parameter; check all gradients before any state is made."""
        self._watch, self._parts = None, []
        active = self._active()
        if not active:
            return []
        sharded = any(_sharding.is_dtensor(p) for *_, p in active)
        self._mesh = _sharding.Mesh([p for *_, p in active]) if sharded else None
        self._ensure_flats()
        self._make_states(active)
        members: dict[torch.device, list[Member]] = defaultdict(list)
        demp = self._perturbation
        for slot, g, i, p in active:
            member = self._member(slot, g, i, p)
            if demp is not None:
                member.lasso, member.noise = p in demp.scales, demp.noise.get(p)
            members[p.device].append(member)
        for device, found in members.items():
            backend = _backends.choose(device.type, self._backend)[0]
            self._parts.append(Part(self._rule, backend, self._flats[device], found, len(self.param_groups), demp))
        self._watch = self._watch_parts(active)
        return self._parts

    def _watch_parts(self, active: list[tuple[int, int, int, Tensor]]) -> Any:
        """A watch that tells whether the parts still hold, or None where they must be planned at every step."""
        grads = {m.slot: m.grad for part in self._parts for m in part.members}
        planned = all(part.table is not None and not part.copies for part in self._parts)
        own = all(_sharding.local(p.grad).data_ptr() == grads[slot].data_ptr() for slot, *_, p in active)  # type: ignore[arg-type]
        if not (planned and own):
            return None
        tables = {part.flat.shared.device: part.table for part in self._parts}
        watch = _native.plan.Watch()
        for slot, _, _, p in self._all():
            state = self.state.get(p)
            streams = [p, p.grad, *(state[key] for key in self._rule.states)] if slot in grads and state else []
            watch.add(p, state, streams, tables.get(p.device), slot, _sharding.is_dtensor(p))
        watch.seal(self.state)
        for part in self._parts:
            part.forget_tensors()
        return watch
