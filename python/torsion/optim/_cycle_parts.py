"""What the passes of an outer step need on each device: buffers, launch tables, and the launch itself."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from torsion.ops import _dispatch, _native
from torsion.ops._cycle import CLOSING, RULES, SLOT, STATES, stream_names
from torsion.ops._frame import Phase
from torsion.ops._rules import Rule
from torsion.optim import _layout
from torsion.optim._cycle import Settings
from torsion.optim._parts import KINDS, STOCHASTIC_KINDS, Flat, Member


@dataclass(slots=True)
class Buffers:
    """What an outer step keeps of one parameter, float32 (float64 for float64 parameters), laid out as the parameter.

    Attributes:
        slow: the parameter as the outer step found it.
        fast: moved by the descents; None with k = 1, where the only one goes from ``slow`` to the parameter.
        first: fast weights after the first descent, for an adaptive alpha with k >= 3.
        perturbed: the perturbed weights in full where the parameter is bfloat16 or float16; else it holds them itself.
    """

    slow: Tensor
    fast: Tensor | None
    first: Tensor | None
    perturbed: Tensor | None

    @classmethod
    def like(cls, param: Tensor, settings: Settings) -> Buffers:
        """Buffers for the dense tensor ``param``."""
        dtype = torch.float64 if param.dtype == torch.float64 else torch.float32

        def new(wanted: bool) -> Tensor | None:
            return torch.empty_like(param, dtype=dtype) if wanted else None

        return cls(
            torch.empty_like(param, dtype=dtype),
            new(settings.k > 1),
            new(settings.keeps_first),
            new(param.dtype != dtype),
        )

    def fits(self, param: Tensor) -> bool:
        """Whether they belong to a tensor laid out as ``param``."""
        return (
            self.slow.shape == param.shape
            and self.slow.device == param.device
            and _layout.same_layout(self.slow, param)
            and (self.perturbed is None) == (param.dtype == self.slow.dtype)
        )


@dataclass(frozen=True)
class Pass:
    """One pass over all parts: a rule, where it reads and writes the fast weights, and the numbers of this moment."""

    rule: str
    streams: tuple[str, ...]
    hyper: Tensor
    lrs: list[Tensor]
    found_inf: Tensor | None
    max_grad_norm: float | None
    opens: bool

    def found_inf_on(self, device: torch.device) -> Tensor | None:
        """``found_inf`` as kernels on ``device`` take it."""
        found = self.found_inf
        return None if found is None else found.to(device, torch.float32, non_blocking=True)


@dataclass
class CyclePart:
    """The members of an outer step on one device.

    ``complete``: with the base's state, which ascents do without. ``blends``: some pass interpolates by itself.
    """

    rule: Rule
    backend: str
    flat: Flat
    members: list[Member]
    buffers: list[Buffers]
    scaled: list[bool]
    n_groups: int
    settings: Settings
    complete: bool
    blends: bool
    tables: dict[bool, Any] = field(default_factory=dict)
    """Launch tables; that of the blend (True) has the scopes of alpha instead of the base's."""

    def __post_init__(self) -> None:
        """Build the tables of a compiled back end."""
        self.copies = [m for m in self.members if m.write_back is not None]
        self.params = [m.param if m.write_back is None else m.write_back for m in self.members]
        self.states = [t for m in self.members for t in m.states]
        scopes = self.flat.steps.numel() if self.settings.alpha_scope == "tensor" else 1
        device = self.flat.shared.device
        self.alphas = torch.zeros(scopes, 1, dtype=torch.float64, device=device)
        self.workspaces: dict[bool, Tensor | None] = {False: None, True: None}
        if self.backend not in ("cpu", "cuda"):
            return
        own, of_alpha = [m.scope for m in self.members], self._alpha_scopes()
        self.tables[False] = self._table(own, self.flat.shared.shape[0])
        if self.blends:
            self.tables[True] = self._table(of_alpha, scopes)
        # A table puts the rows of a scope side by side.
        self._in_order = own == sorted(own) and of_alpha == sorted(of_alpha)
        if self.backend == "cuda":
            for blend, table in self.tables.items():
                size = table.workspace_bytes("lookbehind")
                self.workspaces[blend] = torch.empty(size, dtype=torch.uint8, device=device)

    @property
    def table(self) -> Any:
        """The table whose gradients a watch keeps true, None on a back end in Python."""
        return self.tables.get(False)

    def _alpha_scopes(self) -> list[int]:
        return [m.slot if self.settings.alpha_scope == "tensor" else 0 for m in self.members]

    def _streams(self) -> dict[str, list[Tensor]]:
        """Tensors by their place in a row; absent ones are left out."""
        members, buffers = self.members, self.buffers
        perturbed = [m.param if b.perturbed is None else b.perturbed for m, b in zip(members, buffers, strict=True)]
        streams: dict[str, Any] = {
            "param": [m.param for m in members],
            "grad": [m.grad for m in members],
            "slow": [b.slow for b in buffers],
            "fast": [b.fast for b in buffers],
            "first": [b.first for b in buffers],
            "perturbed": perturbed,
        }
        if self.complete:
            streams |= {name: [m.states[k] for m in members] for k, name in enumerate(STATES[: len(self.rule.states)])}
        return {name: tensors for name, tensors in streams.items() if None not in tensors}

    def _table(self, scopes: list[int], n_scopes: int) -> Any:
        members, streams = self.members, self._streams()
        nowhere = array("Q", bytes(8 * len(members)))
        pointers = [array("Q", (t.data_ptr() for t in streams[s])) if s in streams else nowhere for s in SLOT]
        table = _native.plan.Table()
        table.build(
            pointers=pointers,
            numel=array("q", (m.param.numel() for m in members)),
            kinds=[(KINDS | STOCHASTIC_KINDS if m.stochastic else KINDS)[m.param.dtype] for m in members],
            scopes=scopes,
            groups=[m.group for m in members],
            slots=[m.slot for m in members],
            weights=[m.weight for m in members],
            keys=[m.key for m in members],
            scaled=[int(x) for x in self.scaled],
            n_scopes=n_scopes,
            n_groups=self.n_groups,
        )
        return table

    def forget_gradients(self) -> None:
        """From now on the tables' pointers, which a watch keeps true, stand for the tensors."""
        self.members = []

    # Launching

    def whole(self, call: Pass) -> None:
        """One pass over this part alone."""
        self._launch(call, 0, None)

    @property
    def closes(self) -> bool:
        """Whether :meth:`close` can run: piece k of one table is then piece k of the other."""
        return len(self.tables) == 2 and self._in_order

    def close(self, last: Pass, blend: Pass) -> None:
        """The last descent and the adaptive blend over this part alone, in a pass less than one by one."""
        torch.autograd.graph.increment_version(self.params + self.states)
        flat = self.flat
        torch.ops.torsion.lookbehind_closing_planned_.default(
            self.tables[False].address, CLOSING[last.rule]["number"], [SLOT[name] for name in last.streams],
            flat.shared, flat.steps, flat.status, last.hyper, last.lrs, last.found_inf_on(self.alphas.device),
            last.max_grad_norm, self.workspaces[False], self.tables[True].address,
            [SLOT[name] for name in blend.streams], self.alphas, blend.hyper, self.workspaces[True],
        )  # fmt: skip
        self._write_back()

    def reduce(self, call: Pass) -> Tensor:
        """First half of a split pass: this part's sums, float64 ``[S + 1, N]``."""
        if not self.tables:
            return _dispatch.reduce_phase(self._phase(call), self.backend)
        rows = (self.alphas if _blends(call) else self.flat.shared).shape[0] + 1
        sums = torch.empty(rows, RULES[call.rule]["sums"], dtype=torch.float64, device=self.alphas.device)
        self._launch(call, 1, sums)
        return sums

    def apply_(self, call: Pass, sums: Tensor) -> None:
        """Second half: continue from the sums over all parts and ranks."""
        self._launch(call, 2, sums)

    def _launch(self, call: Pass, phase: int, sums: Tensor | None) -> None:
        if phase != 1:
            # Before the update, whose traffic drives the version counters out of the cache.
            written = self.params + self.states if "descent" in call.rule else self.params
            torch.autograd.graph.increment_version(written)
        if self.tables:
            self._launch_compiled(call, phase, sums)
        else:
            _dispatch.run_phase_(self._phase(call), sums, self.backend)
        if phase != 1:
            self._write_back()

    def _write_back(self) -> None:
        for m in self.copies:
            m.write_back.copy_(m.param)  # type: ignore[union-attr]

    def _launch_compiled(self, call: Pass, phase: int, sums: Tensor | None) -> None:
        blends, flat = _blends(call), self.flat
        torch.ops.torsion.lookbehind_planned_.default(
            self.tables[blends].address, RULES[call.rule]["number"], [SLOT[name] for name in call.streams], call.opens,
            self.alphas if blends else flat.shared, flat.steps, flat.status, call.hyper, call.lrs,
            call.found_inf_on(self.alphas.device), call.max_grad_norm, phase, sums, self.workspaces[blends],
        )  # fmt: skip

    def _phase(self, call: Pass) -> Phase:
        """The lists a back end in Python takes."""
        streams, blends = self._streams(), _blends(call)
        named = dict(zip(stream_names(call.rule, self.rule), call.streams, strict=True))
        return Phase(
            params=streams["param"],
            grads=streams["grad"],
            states=[streams[name] for name in STATES if name in streams],
            shared=self.alphas if blends else self.flat.shared,
            steps=self.flat.steps,
            status=self.flat.status,
            hyper=call.hyper,
            lrs=call.lrs,
            scopes=self._alpha_scopes() if blends else [m.scope for m in self.members],
            groups=[m.group for m in self.members],
            slots=[m.slot for m in self.members],
            found_inf=call.found_inf_on(self.alphas.device),
            max_grad_norm=call.max_grad_norm,
            weights=[m.weight for m in self.members],
            keys=[m.key for m in self.members],
            rule=call.rule,
            source=streams[named["source"]] if "source" in named else (),
            target=streams[named["target"]] if "target" in named else (),
            slow=streams["slow"],
            first=streams[named["first"]] if "first" in named else (),
            perturbed=streams["perturbed"],
            scaled=self.scaled,
            opens=call.opens,
        )


def _blends(call: Pass) -> bool:
    return call.rule.startswith("blend")
