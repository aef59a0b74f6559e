"""The optimizer around the torque rules: step, diagnostics, checkpoints. TAM and AdaTAM(W) add names and numbers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from torsion.ops import _backends, _dispatch
from torsion.optim import _checkpoint, _layout, _sharding
from torsion.optim._parts import Flat, Part, Scalars
from torsion.optim._planned import PlannedOptimizer

_NAN = float("nan")  # one object, so that tuples holding it compare equal by identity


class TorqueOptimizer(PlannedOptimizer):
    """Base of TAM and AdaTAM(W): a ``torch.optim.Optimizer`` whose step is one fused op per device."""

    _own_keys: ClassVar[tuple[str, ...]] = ()
    """Group keys that a checkpoint does not change."""

    # GradScaler then hands over its scale and its finding as tensors, and nobody waits for the device.
    _step_supports_amp_scaling = True

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
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
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
        for _, of, i, p in active:
            problem = self._compile_problem(p, len({q.device for *_, q in active}))
            if problem:
                raise RuntimeError(f"{self._describe(of, i)}: {problem}; call step() outside torch.compile")
        self._ensure_flats()
        self._make_states(active)
        g = next(k for k, own in enumerate(self.param_groups) if own is group)
        for slot, of, i, p in active:
            if of == g:
                member = self._member(slot, g, i, p)
                params.append(p)
                grads.append(p.grad)  # type: ignore[arg-type]
                states.extend(member.states)
                places.extend((member.scope, g, slot))
        flat = next(iter(self._flats.values()))
        flats.extend((flat.shared, flat.steps, flat.status))
        self._stepped = True

    def _compile_problem(self, p: Tensor, devices: int) -> str:
        """What keeps the step of ``p`` out of a graph."""
        chosen, behind_op = _backends.choose(p.device.type, self._backend)[0], _dispatch.BEHIND_OPS[p.device.type]
        if self._perturbation is not None:
            return "DemP adds its lasso and noise inside the step"
        if _sharding.is_dtensor(p):
            return "it is sharded"
        if not _layout.is_dense(p) or p.grad.dtype != p.dtype or not _layout.same_layout(p.grad, p):  # type: ignore[union-attr,arg-type]
            return "its gradient differs in layout or dtype, or it has gaps in memory"
        if devices > 1:
            return f"parameters are on {devices} devices"
        return "" if chosen == behind_op else f"its back end is {chosen!r}, torch.compile takes {behind_op!r}"

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
        keys, result = self._keys(), dict[Any, Tensor]()
        flats = [(flat, flat.shared[:, k].clone()) for flat in self._flats.values()]
        for slot, g, _, p in self._all():
            # By where the state's view lies, which holds also when groups or the scope changed since the last step.
            correlation = self.state.get(p, {}).get("correlation")
            for flat, column in flats:
                row = flat.row_of(correlation)
                if row is not None:
                    result.setdefault(keys[self._scope_of(slot, g)], column[row])
        return result

    def cosine(self) -> dict[Any, Tensor]:
        """The cosine s of the last step by scope: 0-dim tensors in [-1, 1] on the device, without waiting for it.

        Keys are "global", the group's index, or the parameter's name (else "group.index"). Empty before the first step,
        unchanged by a skipped one.
        """
        return self._column(1)

    def damping(self) -> dict[Any, Tensor]:
        """(1 + smoothed cosine) / 2 by scope, in [0, 1]: factor of the gradient in the last step; else as cosine()."""
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

    def __getstate__(self) -> dict[str, Any]:
        """What deepcopy and pickle take: plans and device tables are made anew."""
        return {**super().__getstate__(), "_backend": self._backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over groups and state, also of an optimizer of another version."""
        self._forget()
        super().__setstate__(state)
        self.__dict__.setdefault("_backend", None)
        self.__dict__.setdefault("_perturbation", None)
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    @_disable_dynamo
    def state_dict(self) -> dict[str, Any]:
        """State and groups as torch's optimizers give them, every scalar a tensor of its own."""
        result = super().state_dict()
        if isinstance(result.get("state"), dict):  # a hook may have made anything of it
            result["state"] = _checkpoint.unshared(result["state"])
        return result

    @_disable_dynamo
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this optimizer or of its torch counterpart: SGD for TAM, Adam and AdamW for AdaTAM(W).

        Values that the saved class has come from the checkpoint, the others stay as constructed. State becomes float32
        (float64 for float64 parameters) whatever the parameter's dtype. All is checked before anything is written.

        Raises:
            ValueError: another model's checkpoint, one of another family, or one with nesterov, dampening or amsgrad.
        """
        cls = type(self).__name__
        state_dict = _checkpoint.copied(state_dict, cls)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            changed = hook(self, state_dict)
            state_dict = state_dict if changed is None else changed
        unknown, saved_groups = _checkpoint.halves(state_dict, cls)
        groups = _checkpoint.merged_groups(saved_groups, self.param_groups, self._own_keys, cls)
        ids = [pid for group in saved_groups for pid in group["params"]]
        state: defaultdict[Tensor, Any] = defaultdict(dict)
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
