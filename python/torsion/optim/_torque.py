"""The optimizer around the torque rules: planning, stepping, state. TAM and AdaTAM(W) add names and numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from torsion.ops import _backends, _dispatch, _native
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
        if backend is not None:
            _checks.word("", "backend", backend, _backends.NAMES, "or None for the best")
        self._backend = backend
        self._forget()
        self._check_numbers("", defaults)
        super().__init__(_checks.not_empty(type(self).__name__, params), defaults)
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
        names = [self._describe(g, i) for i in range(len(params))]
        for name, p in zip(names, params, strict=True):
            _checks.parameter(name, p)
        _checks.distinct(names, [id(p) for p in params], "is given twice; list it once")
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

    # Planning: from the parameters as they are to parts that can be launched again and again

    def _forget(self) -> None:
        """Drop everything that can be derived from groups and state."""
        self._watch: Any = None
        self._parts: list[Part] = []
        self._mesh: _sharding.Mesh | None = None
        self._flats: dict[torch.device, Flat] = {}
        self._stepped = False
        self._settings: object = None
        self._hyper: Tensor | None = None
        self._structure: object = None

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
        filled: set[tuple[torch.device, int]] = set()
        for slot, g, _, p in everyone:
            state = self.state.get(p)
            if state:
                self._adopt(slot, g, p, state, filled, list(old.values()))

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

    def _adopt(
        self, slot: int, g: int, p: Tensor, state: dict[str, Any], filled: set[tuple[torch.device, int]], old: list[Flat]
    ) -> None:
        """Copy a parameter's scalars into the flats and put views of them in their place."""
        scope = self._scope_of(slot, g)
        step, correlation = state.get("step"), state.get("correlation")
        for device, flat in self._flats.items():
            if (device, scope) not in filled and correlation is not None:
                filled.add((device, scope))
                row = next((r for f in old if (r := f.row_of(correlation)) is not None), None)
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

    def _member(self, slot: int, g: int, i: int, p: Tensor) -> Member:
        """One parameter as the kernels will see it; copies where its layout asks for them."""
        name, group, state = self._describe(g, i), self.param_groups[g], self.state[p]
        param, grad = _sharding.local(p), _sharding.local(_sharding.matching(p, p.grad))
        write_back = None
        if not _layout.is_dense(param):
            write_back, param = param, param.detach().clone(memory_format=torch.contiguous_format)
        grad = _layout.laid_out_as(grad.to(param.dtype), param)
        states = []
        for key in self._rule.states:
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
        member = Member(slot, g, self._scope_of(slot, g), param, grad, states, bool(group["stochastic_rounding"]))
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
        filled = [(g, i, _sharding.local(p)) for _, g, i, p in active if _sharding.local(p).numel()]
        _checks.distinct(
            [self._describe(g, i) for g, i, _ in filled],
            [t.data_ptr() for *_, t in filled],
            "shares memory; make both one Parameter",
        )
        _checks.one_device_type([p for *_, p in active])
        return active

    def _plan(self) -> list[Part]:
        """Look at every parameter; check all gradients before any state is made."""
        self._watch, self._parts = None, []
        active = self._active()
        if not active:
            return []
        self._mesh = _sharding.Mesh([p for *_, p in active]) if any(_sharding.is_dtensor(p) for *_, p in active) else None
        self._ensure_flats()
        self._make_states(active)
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

    def _rows(self) -> list[tuple[float, ...]]:
        """The groups' numbers in the order of the rule's columns; NaN where the learning rate lives in a tensor."""
        return [
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

    def _numbers(self) -> Tensor:
        """The groups' numbers as float64 ``[G, H]``; checked and made anew only when the user changed one."""
        words = [(g["scope"], g["max_grad_norm"], g.get("init"), g["stochastic_rounding"]) for g in self.param_groups]
        settings = self._rows(), words
        if settings == self._settings and self._hyper is not None:
            return self._hyper
        for g in range(len(self.param_groups)):
            self._check_settings(g)
        self._draw_seeds()
        self._hyper = torch.tensor(self._rows(), dtype=torch.float64)
        if words != self._structure:
            self._structure, self._watch = words, None
        self._settings = settings
        return self._hyper

    def _scalars(self, hyper: Tensor) -> Scalars:
        def tensor(value: Any) -> Tensor | None:
            return value if value is None or isinstance(value, Tensor) else torch.tensor(float(value))

        return Scalars(
            hyper,
            [g["lr"] for g in self.param_groups if isinstance(g["lr"], Tensor)],
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
        scalars = self._scalars(self._numbers())
        if self._watch is not None and self._watch.holds(self.param_groups, self.state):
            parts = self._parts
        else:
            parts = self._plan()
        if not parts:
            return
        self._stepped = True
        if len(parts) == 1 and self._mesh is None:
            parts[0].whole(scalars.on(parts[0].flat.shared.device))
        else:
            self._split_step(parts, [scalars.on(part.flat.shared.device) for part in parts])
        if self._watch is None:
            self._parts = []  # they hold gradients, which must not outlive zero_grad()

    def _split_step(self, parts: list[Part], placed: list[Scalars]) -> None:
        """A step over several devices or ranks: sums, their total, then the update."""
        sums = [part.reduce(s) for part, s in zip(parts, placed, strict=True)]
        total = sums[0]
        for other in sums[1:]:
            total = total + other.to(total.device, non_blocking=True)
        if self._mesh is not None:
            if placed[0].found_inf is not None:  # on one rank it must stop all
                total = torch.where(placed[0].found_inf.reshape(()) != 0, _NAN, total)
            self._mesh.all_reduce_(total)
        for part, s in zip(parts, placed, strict=True):
            part.apply_(s, total.to(part.flat.shared.device, non_blocking=True))

    # torch.compile: the same step through the list op, which a compiler can see into. Traced code sets no attribute:
    # dynamo drops that on an optimizer.

    def _init_group(
        self,
        group: dict[str, Any],
        params: list[Tensor],
        grads: list[Tensor],
        states: list[Tensor],
        flats: list[Tensor],
        places: list[int],
    ) -> None:
        """Fill the lists for one group, ``places`` with scope, group and slot of each; dynamo runs this for real."""
        active = self._active()
        if not active:
            return
        self._ensure_flats()
        self._make_states(active)
        g = next(k for k, own in enumerate(self.param_groups) if own is group)
        for slot, of, i, p in active:
            if of != g:
                continue
            member = self._member(slot, g, i, p)
            chosen = _backends.choose(p.device.type, self._backend)[0]
            problem = ""
            if _sharding.is_dtensor(p):
                problem = "it is sharded"
            elif member.write_back is not None or member.grad is not p.grad:
                problem = "its gradient differs in layout or dtype, or it has gaps in memory"
            elif chosen != _dispatch.BEHIND_OPS[p.device.type]:
                problem = f"its back end is {chosen!r}, torch.compile takes {_dispatch.BEHIND_OPS[p.device.type]!r}"
            elif len(self._flats) > 1:
                problem = f"parameters are on {len(self._flats)} devices"
            if problem:
                raise RuntimeError(f"{self._describe(g, i)}: {problem}; call step() outside torch.compile")
            params.append(p)
            grads.append(p.grad)  # type: ignore[arg-type]
            states.extend(member.states)
            places.extend((member.scope, g, slot))
        flat = next(iter(self._flats.values()))
        flats.extend((flat.shared, flat.steps, flat.status))
        self._stepped = True

    def _traced_step(self) -> None:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        states: list[Tensor] = []
        flats: list[Tensor] = []
        places: list[int] = []
        for group in self.param_groups:
            # Lists of its own: dynamo runs _init_group for real only with empty ones.
            of_group: tuple[list[Any], ...] = ([], [], [], [], [])
            self._init_group(group, *of_group)
            params += of_group[0]
            grads += of_group[1]
            states += of_group[2]
            flats = of_group[3] or flats
            places += of_group[4]
        if not params:
            return
        n = len(self._rule.states)
        s = self._scalars(torch.tensor(self._rows(), dtype=torch.float64)).on(params[0].device)
        getattr(torch.ops.torsion, self._rule.op)(
            params, grads, *(states[k::n] for k in range(n)), *flats, s.hyper, s.lrs,
            places[0::3], places[1::3], places[2::3], s.grad_scale, s.found_inf, s.max_grad_norm,
        )  # fmt: skip

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
        if isinstance(result.get("state"), dict):  # a hook may have made anything of it
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
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
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
            for g in range(len(self.param_groups)):
                self._check_settings(g)
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

