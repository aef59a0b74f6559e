"""The optimizer around the torque rules: planning, stepping, state. TAM and AdaTAM(W) add names and numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from torsion.ops import _backends, _native
from torsion.ops._rules import Rule
from torsion.optim import _checkpoint, _checks, _layout, _sharding
from torsion.optim._parts import Flat, Member, Part, Scalars

_NAN = float("nan")  # one object, so that tuples holding it compare equal by identity


class TorqueOptimizer(torch.optim.Optimizer):
    """Base of TAM and AdaTAM(W): a ``torch.optim.Optimizer`` whose step is one fused op per device."""

    _rule: ClassVar[Rule]
    _own_keys: ClassVar[tuple[str, ...]] = ()
    """Group keys that a checkpoint does not change."""

    # GradScaler then hands over its scale and its finding as tensors, and nobody waits for the device.
    _step_supports_amp_scaling = True

    def __init__(self, params: Any, defaults: dict[str, Any], backend: str | None, untaken: dict[str, object]) -> None:
        """Check everything, then let torch build the groups."""
        _checks.reject_untaken(type(self).__name__, untaken)
        if backend is not None and backend not in _backends.NAMES:
            raise ValueError(f"backend={backend!r}: must be one of {', '.join(_backends.NAMES)}, or None for the best")
        self._backend = backend
        self._forget()
        self._check_numbers("", defaults)
        super().__init__(params, defaults)
        for device in {p.device.type for _, _, _, p in self._all()}:
            _backends.choose(device, backend)

    # Names, groups and their checks

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

    def _check_numbers(self, where: str, group: dict[str, Any]) -> None:
        """Check one group's values; subclasses add theirs."""
        _checks.rate(where, group["lr"])
        for name in ("weight_decay", "eps_damping"):
            _checks.at_least_zero(where, name, group[name])
        _checks.fraction(where, "decay", group["decay"], closed=True)
        _checks.clip_norm(where, group["max_grad_norm"])
        _checks.word(where, "scope", group["scope"], _checks.SCOPES)
        _checks.word(where, "init", group.get("init", "zero"), _checks.INITS)
        _checks.seed(where, group["sr_seed"])

    def _check_groups(self) -> None:
        groups = self.param_groups
        for g, group in enumerate(groups):
            self._check_numbers(f"group {g}: " if len(groups) > 1 else "", group)
            for i, p in enumerate(group["params"]):
                _checks.parameter(self._describe(g, i), p)
        _checks.agree(groups, [k for k in ("scope", "init", "max_grad_norm") if k in groups[0]], "a step has one")
        if groups[0]["scope"] == "global":
            _checks.agree(groups, ("decay", "eps_damping"), 'with scope="global" all groups share one cosine')
        types = {p.device.type for _, _, _, p in self._all()}
        if len(types) > 1:
            raise ValueError(
                f"parameters are on {' and '.join(sorted(types))}; one step cannot span both, so move the model to one "
                "device or give each device type its own optimizer"
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as in torch; it joins the scope at the next step.

        Raises:
            ValueError: a value is out of range, or does not agree with the other groups where it must.
            TypeError: a parameter has a dtype the kernels do not know.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if group["stochastic_rounding"] and group["sr_seed"] is None:
            group["sr_seed"] = int(torch.randint(2**53 - 1, ()))
        try:
            self._check_groups()
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise
        self._watch = None

    # Planning: from the parameters as they are to parts that can be launched again and again

    def _forget(self) -> None:
        """Drop everything that can be derived from groups and state."""
        self._watch: Any = None
        self._parts: list[Part] = []
        self._mesh: _sharding.Mesh | None = None
        self._flats: dict[torch.device, Flat] = {}
        self._stepped = False
        self._rows: list[tuple[float, ...]] | None = None
        self._hyper: Tensor | None = None
        self._structure: tuple[object, ...] = ()

    def _scope_of(self, slot: int, group: int) -> int:
        return {"global": 0, "group": group, "tensor": slot}[self.param_groups[0]["scope"]]

    def _ensure_flats(self) -> None:
        """Have one :class:`Flat` per device that the state's scalars are views of; rebuild from the state if not."""
        everyone = list(self._all())
        slots = len(everyone)
        scopes = {"global": 1, "group": len(self.param_groups), "tensor": slots}[self.param_groups[0]["scope"]]
        dtype = torch.float64 if any(p.dtype == torch.float64 for *_, p in everyone) else torch.float32
        devices = {p.device for *_, p in everyone}
        if set(self._flats) == devices and all(f.fits(slots, scopes, dtype) for f in self._flats.values()):
            if all(self._is_view(slot, g, p) for slot, g, _, p in everyone if self.state.get(p)):
                return
        old = self._flats
        self._flats = {}
        for device in devices:
            self._flats[device] = flat = Flat(device, slots, scopes, dtype)
            if device in old:
                flat.status.copy_(old[device].status)
                if old[device].shared.shape == flat.shared.shape:
                    flat.shared.copy_(old[device].shared)
        filled: set[tuple[torch.device, int]] = set()
        for slot, g, _, p in everyone:
            state = self.state.get(p)
            if state:
                self._adopt(slot, g, p, state, filled)

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

    def _adopt(self, slot: int, g: int, p: Tensor, state: dict[str, Any], filled: set[tuple[torch.device, int]]) -> None:
        """Copy a parameter's scalars into the flats and put views of them in their place."""
        scope = self._scope_of(slot, g)
        step, correlation = state.get("step"), state.get("correlation")
        for device, flat in self._flats.items():
            if (device, scope) not in filled and correlation is not None:
                filled.add((device, scope))
                flat.shared[scope, 0].copy_(torch.as_tensor(correlation), non_blocking=True)
                flat.shared[scope, 2].copy_((1 + flat.shared[scope, 0]) / 2)
        flat = self._flats[p.device]
        flat.steps[slot].copy_(torch.as_tensor(1.0 if step is None else step).reshape(()), non_blocking=True)
        rest = {k: v for k, v in state.items() if k not in ("step", "correlation")}
        state.clear()
        state.update({"step": flat.steps[slot], **rest, "correlation": flat.shared[scope, 0]})

    def _new_state(self, slot: int, g: int, p: Tensor) -> None:
        flat = self._flats[p.device]
        dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
        zeros = {key: torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format) for key in self._rule.states}
        self.state[p].update({"step": flat.steps[slot], **zeros, "correlation": flat.shared[self._scope_of(slot, g), 0]})

    def _member(self, slot: int, g: int, i: int, p: Tensor) -> Member:
        """One parameter as the kernels will see it; copies where its layout asks for them."""
        name, group, state = self._describe(g, i), self.param_groups[g], self.state[p]
        whole_grad = _sharding.matching_grad(p, p.grad, name)
        param, grad = _sharding.local(p), _sharding.local(whole_grad)
        write_back = None
        if not _layout.is_dense(param):
            if _layout.may_overlap(param):
                raise ValueError(f"{name}: its elements share memory (strides {param.stride()}); make it .contiguous()")
            write_back, param = param, param.detach().clone(memory_format=torch.contiguous_format)
        grad = _layout.laid_out_as(grad.to(param.dtype), param)
        states = []
        for key in self._rule.states:
            held = state.get(key)
            if not isinstance(held, Tensor) or held.shape != p.shape:
                found = tuple(held.shape) if isinstance(held, Tensor) else type(held).__name__
                raise ValueError(f"{name}: state {key!r} is {found}, needs shape {tuple(p.shape)}; restore or delete it")
            value = _sharding.local(held)
            fitted = _layout.laid_out_as(value.to(torch.float64 if param.dtype == torch.float64 else torch.float32), param)
            if fitted is not value:
                if value is not held:
                    raise ValueError(f"{name}: the local part of {key!r} lies in memory otherwise than its parameter")
                state[key] = fitted
            states.append(fitted)
        member = Member(slot, g, self._scope_of(slot, g), param, grad, states, bool(group["stochastic_rounding"]))
        member.write_back = write_back
        if self._mesh is not None:
            member.weight = self._mesh.weight(p)
            member.key = self._mesh.first_element(p) if member.stochastic else 0
        return member

    def _plan(self) -> list[Part]:
        """Look at every parameter; check all gradients before any state is made."""
        self._watch = None
        active = [(slot, g, i, p) for slot, g, i, p in self._all() if p.grad is not None]
        for _, g, i, p in active:
            _checks.parameter(self._describe(g, i), p)
            _checks.gradient(self._describe(g, i), p, p.grad)  # type: ignore[arg-type]
        if not active:
            self._parts = []
            return []
        self._ensure_flats()
        self._mesh = _sharding.Mesh([p for *_, p in active]) if any(_sharding.is_dtensor(p) for *_, p in active) else None
        for slot, g, _, p in active:
            if not self.state[p]:
                self._new_state(slot, g, p)
        members: dict[torch.device, list[Member]] = defaultdict(list)
        for slot, g, i, p in active:
            members[p.device].append(self._member(slot, g, i, p))
        self._parts = [
            Part(self._rule, _backends.choose(device.type, self._backend)[0], self._flats[device], found, len(self.param_groups))
            for device, found in members.items()
        ]
        self._watch = self._watch_parts(active)
        return self._parts

    def _watch_parts(self, active: list[tuple[int, int, int, Tensor]]) -> Any:
        """A watch that tells whether the parts still hold, or None where they must be planned at every step."""
        grads = {m.slot: m.grad for part in self._parts for m in part.members}
        planned = all(part.table is not None and not part.copies for part in self._parts)
        own = all(_sharding.local(p.grad).data_ptr() == grads[slot].data_ptr() for slot, _, _, p in active)  # type: ignore[arg-type]
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

    # The step

    def _group_numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        """A group's columns after the common ones, in the order of the rule."""
        raise NotImplementedError

    def _numbers(self) -> tuple[Tensor, list[Tensor]]:
        """The groups' numbers as float64 ``[G, H]``, and the learning rates that live in tensors."""
        rows = [
            (
                _NAN if isinstance(g["lr"], Tensor) else g["lr"],
                g["weight_decay"],
                float(g["decoupled_weight_decay"]),
                float(g["maximize"]),
                float(g["stochastic_rounding"]),
                float(g["sr_seed"] or 0),
                *self._group_numbers(g),
            )
            for g in self.param_groups
        ]
        if rows != self._rows or self._hyper is None:
            self._rows, self._hyper = rows, torch.tensor(rows, dtype=torch.float64)
        return self._hyper, [g["lr"] for g in self.param_groups if isinstance(g["lr"], Tensor)]

    def _scalars(self) -> Scalars:
        hyper, lrs = self._numbers()

        def tensor(value: Any) -> Tensor | None:
            return value if value is None or isinstance(value, Tensor) else torch.tensor(float(value))

        return Scalars(
            hyper,
            lrs,
            tensor(getattr(self, "grad_scale", None)),
            tensor(getattr(self, "found_inf", None)),
            self.param_groups[0]["max_grad_norm"],
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step. A non-finite gradient anywhere skips it as a whole, on every rank, and counts it.

        Args:
            closure: called once, with gradients enabled, before anything else; returns the loss.

        Returns:
            What ``closure`` returned, else None.

        Raises:
            ValueError: a gradient's shape or device differs from its parameter's, or parameters share memory.
            TypeError: a gradient's dtype would lose digits in its parameter's.
            RuntimeError: a gradient is sparse.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            self._traced_step()
        else:
            self._eager_step()
        return loss

    def _eager_step(self) -> None:
        structure = tuple((g["scope"], g["stochastic_rounding"]) for g in self.param_groups)
        if structure != self._structure:
            self._check_groups()
            self._structure, self._watch = structure, None
        if self._watch is not None and self._watch.holds(self.param_groups, self.state):
            parts = self._parts
        else:
            parts = self._plan()
        if not parts:
            return
        self._stepped = True
        scalars = self._scalars()
        if len(parts) == 1 and self._mesh is None:
            parts[0].whole(scalars.on(parts[0].flat.shared.device))
            return
        placed = [scalars.on(part.flat.shared.device) for part in parts]
        sums = [part.reduce(s) for part, s in zip(parts, placed, strict=True)]
        total = sums[0]
        for other in sums[1:]:
            total = total + other.to(total.device, non_blocking=True)
        if self._mesh is not None:
            self._mesh.all_reduce_(total)
        for part, s in zip(parts, placed, strict=True):
            part.apply_(s, total.to(part.flat.shared.device, non_blocking=True))

    # torch.compile: the same step through the list op, which a compiler can see into

    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], states: list[Tensor], flats: list[Tensor]
    ) -> None:
        """Append the group's tensors to the lists; torch.compile runs this for real when it traces a step."""
        self._ensure_flats()
        g = next(k for k, own in enumerate(self.param_groups) if own is group)
        for slot, of, i, p in self._all():
            if of != g or p.grad is None:
                continue
            if not self.state[p]:
                self._new_state(slot, g, p)
            member = self._member(slot, g, i, p)
            if member.write_back is not None or member.grad.data_ptr() != p.grad.data_ptr() or _sharding.is_dtensor(p):
                raise RuntimeError(
                    f"{self._describe(g, i)}: its layout or sharding needs the eager step; call step() outside torch.compile"
                )
            params.append(p)
            grads.append(p.grad)
            states.extend(member.states)
        if not flats:
            flat = next(iter(self._flats.values()))
            flats.extend((flat.shared, flat.steps, flat.status))
        self._stepped = True

    def _traced_step(self) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        states: list[Tensor] = []
        flats: list[Tensor] = []
        scopes: list[int] = []
        groups: list[int] = []
        slots: list[int] = []
        slot = 0
        scope = self.param_groups[0]["scope"]
        for g, group in enumerate(self.param_groups):
            self._init_group(group, params, grads, states, flats)
            for p in group["params"]:
                if p.grad is not None:
                    scopes.append(0 if scope == "global" else g if scope == "group" else slot)
                    groups.append(g)
                    slots.append(slot)
                slot += 1
        if not params:
            return
        hyper, lrs = self._numbers_traced()
        n = len(self._rule.states)
        getattr(torch.ops.torsion, self._rule.op)(
            params, grads, *(states[k::n] for k in range(n)), *flats, hyper, lrs, scopes, groups, slots,
            getattr(self, "grad_scale", None), getattr(self, "found_inf", None), self.param_groups[0]["max_grad_norm"],
        )  # fmt: skip

    def _numbers_traced(self) -> tuple[Tensor, list[Tensor]]:
        self._rows = None
        return self._numbers()

    # What a step did, and state

    def _keys(self) -> list[Any]:
        scope = self.param_groups[0]["scope"]
        if scope == "global":
            return ["global"]
        if scope == "group":
            return list(range(len(self.param_groups)))
        return [self._name(g, i) for _, g, i, _ in self._all()]

    def _column(self, k: int) -> dict[Any, Tensor]:
        if not self._stepped:
            return {}
        seen: dict[int, Tensor] = {}
        for slot, g, _, p in self._all():
            if self.state.get(p):
                seen.setdefault(self._scope_of(slot, g), self._flats[p.device].shared)
        copies = {id(t): t[:, k].clone() for t in seen.values()}
        keys = self._keys()
        return {keys[s]: copies[id(t)][s] for s, t in sorted(seen.items())}

    def cosine(self) -> dict[Any, Tensor]:
        """The cosine s of the last step by scope: 0-dim tensors in [-1, 1] on the device, without waiting for it.

        Keys are "global", the group's index, or the parameter's name (else "group.index"). Empty before the first step,
        unchanged by a skipped one.
        """
        return self._column(1)

    def damping(self) -> dict[Any, Tensor]:
        """(1 + smoothed cosine) / 2 by scope, in [0, 1]: the factor of the gradient in the last step; else as cosine()."""
        return self._column(2)

    def _any_flat(self) -> Flat:
        return next(iter(self._flats.values())) if self._flats else Flat(self._first_device(), 0, 0, torch.float32)

    def _first_device(self) -> torch.device:
        return next((p.device for *_, p in self._all()), torch.device("cpu"))

    def grad_norm(self) -> Tensor:
        """Norm of all gradients in the last step, unscaled, before clipping: 0-dim float64 on the device.

        0 before the first step, not finite after a skipped one.
        """
        return self._any_flat().grad_norm()

    def skipped_steps(self) -> Tensor:
        """Steps skipped so far for a non-finite gradient or ``found_inf``: 0-dim int64 on the device."""
        return self._any_flat().status[0].clone()

    def __getstate__(self) -> dict[str, Any]:  # type: ignore[override]
        """What deepcopy and pickle take: plans and device tables are made anew."""
        return {**super().__getstate__(), "_backend": self._backend}  # type: ignore[no-untyped-call]

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over groups and state, also of an optimizer of another version."""
        self._forget()
        super().__setstate__(state)
        self.__dict__.setdefault("_backend", None)

    @torch._disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """State and groups as torch's optimizers give them, every scalar a tensor of its own."""
        result = super().state_dict()
        result["state"] = _checkpoint.unshared(result["state"])
        return result

    @torch._disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer or of its torch counterpart (SGD for TAM; Adam, AdamW for AdaTAM and AdaTAMW).

        Values that the saved class has come from the checkpoint, the others stay as constructed. State becomes float32
        (float64 for float64 parameters) whatever the parameter's dtype. Everything is checked before anything is written.

        Raises:
            ValueError: another model's checkpoint, one of another family, or one with nesterov, dampening or amsgrad.
        """
        state_dict = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = hook(self, state_dict) or state_dict
        cls = type(self).__name__
        if "state" not in state_dict or "param_groups" not in state_dict:
            raise ValueError(f"{cls}: a checkpoint needs 'state' and 'param_groups', found {sorted(map(str, state_dict))}")
        saved_groups = state_dict["param_groups"]
        groups = _checkpoint.merged_groups(saved_groups, self.param_groups, self._own_keys, cls)
        ids = [pid for group in saved_groups for pid in group["params"]]
        state: defaultdict[Tensor, Any] = defaultdict(dict)
        unknown = dict(state_dict["state"])
        for (_, g, i, p), pid in zip(self._all(), ids, strict=True):
            if pid in unknown:
                entry = _checkpoint.converted_state(self._describe(g, i), p, unknown.pop(pid), self._rule.states, cls)
                if entry:
                    state[p] = entry
        state.update(unknown)  # entries that belong to no parameter pass through, as in torch
        before = self.__dict__.copy()
        try:
            self.__setstate__({"state": state, "param_groups": groups})
            self._check_groups()
        except (TypeError, ValueError):
            self.__dict__.clear()
            self.__dict__.update(before)
            raise
        self._keep_status(before["_flats"])
        for post in self._optimizer_load_state_dict_post_hooks.values():
            post(self)

    def _keep_status(self, flats: dict[torch.device, Flat]) -> None:
        """Steps skipped are counted over the life of the object, so a load keeps the counter."""
        self._flats = flats
        for flat in flats.values():
            flat.shared = flat.shared.new_zeros(0, flat.shared.shape[1])

