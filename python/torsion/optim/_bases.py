"""Base optimizers as a fused descent sees them: rule, state and numbers of torch's SGD, Adam and AdamW and of ours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from torsion.ops._rules import ADAM, SGD_MOMENTUM, Rule
from torsion.ops._rules import SGD as PLAIN_SGD
from torsion.optim import _checks
from torsion.optim._parts import Flat, Member
from torsion.optim._planning import Planning
from torsion.optim._torque import TorqueOptimizer
from torsion.optim.adatam import AdaTAM, AdaTAMW
from torsion.optim.tam import TAM

_NAN = float("nan")  # one object, so that rows holding it compare equal


class TorchPlanning(Planning):
    """Planning for an optimizer of torch's, whose groups and state stay its own."""

    def __init__(self, base: Optimizer) -> None:
        """Look at nothing yet."""
        self.base = base
        self._flats: dict[torch.device, Flat] = {}
        self._mesh = None
        self._hyper = torch.empty(0)
        self._seen: list[tuple[float, ...]] | None = None
        self._structure: object = None

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The base's, also after it has loaded a checkpoint."""
        return self.base.param_groups

    @property
    def state(self) -> Any:
        """The base's."""
        return self.base.state

    def _scopes(self) -> int:
        return 1

    def _scope_of(self, slot: int, group: int) -> int:
        return 0

    def _row(self, group: dict[str, Any]) -> tuple[float, ...]:
        """A group's columns after the learning rate."""
        raise NotImplementedError

    def _check(self, where: str, group: dict[str, Any]) -> None:
        _checks.rate(where, group["lr"])
        _checks.at_least_zero(where, "weight_decay", group["weight_decay"])

    def _numbers(self) -> Tensor:
        """The groups' numbers as float64 ``[G, H]``; made anew only when the user changed one."""
        rows = [(_NAN if isinstance(g["lr"], Tensor) else g["lr"], *self._row(g)) for g in self.param_groups]
        if rows != self._seen:
            for i, group in enumerate(self.param_groups):
                self._check(f"group {i}: " if len(rows) > 1 else "", group)
            self._hyper, self._seen = torch.tensor(rows, dtype=torch.float64), rows
        return self._hyper


class SgdPlanning(TorchPlanning):
    """torch.optim.SGD. A counter that is not saved tells the first step of a momentum, which is not dampened."""

    def __init__(self, base: Optimizer) -> None:
        """Choose the rule by the groups as they are."""
        super().__init__(base)
        self._known: dict[Tensor, Tensor] = {}
        self._scratch: dict[Tensor, Tensor] = {}

    @property
    def _rule(self) -> Rule:  # type: ignore[override]
        return SGD_MOMENTUM if any(g["momentum"] for g in self.param_groups) else PLAIN_SGD

    def _row(self, group: dict[str, Any]) -> tuple[float, ...]:
        momentum = group["momentum"]
        dampening = group["dampening"] if momentum else 0.0  # torch leaves it out without momentum
        common = group["weight_decay"], 0.0, float(group["maximize"]), 0.0, 0.0
        return *common, momentum, dampening, float(group["nesterov"])

    def _check(self, where: str, group: dict[str, Any]) -> None:
        super()._check(where, group)
        _checks.at_least_zero(where, "momentum", group["momentum"])

    def _numbers(self) -> Tensor:
        self._structure = self._rule
        return super()._numbers()

    def _active(self) -> list[tuple[int, int, int, Tensor]]:
        for *_, p in self._all():  # torch's own way to say that there is none yet
            if self.state.get(p) and self.state[p].get("momentum_buffer", 0) is None:
                del self.state[p]["momentum_buffer"]
        return super()._active()

    def _is_view(self, slot: int, g: int, p: Tensor) -> bool:
        return self.state[p].get("momentum_buffer") is self._known.get(p)

    def _adopt(self, slot: int, g: int, p: Tensor, filled: object, old: list[Flat]) -> None:
        if "momentum_buffer" in self.state[p]:
            self._known[p] = self.state[p]["momentum_buffer"]
            self._flats[p.device].steps[slot].fill_(1)

    def _make_states(self, active: list[tuple[int, int, int, Tensor]]) -> None:
        for slot, g, _, p in active:
            if self.param_groups[g]["momentum"] and not self.state[p]:
                self._known[p] = self.state[p]["momentum_buffer"] = _zeros(p)
                self._flats[p.device].steps[slot].zero_()

    def _member(self, slot: int, g: int, i: int, p: Tensor, with_states: bool = True) -> Member:
        own = with_states and bool(self.param_groups[g]["momentum"])
        member = super()._member(slot, g, i, p, own)
        if own:
            self._known[p] = self.state[p]["momentum_buffer"]
        elif with_states and self._rule is SGD_MOMENTUM:
            # A group without momentum beside one with: the kernel's old value counts 0 times, torch keeps none.
            held = self._scratch.get(p)
            if held is None or held.shape != member.param.shape:
                held = self._scratch[p] = _zeros(member.param)
            member.states = [held]
        return member


class AdamPlanning(TorchPlanning):
    """torch.optim.Adam and AdamW; ``step`` in the state is a view of the counters on the device."""

    _rule = ADAM

    def _row(self, group: dict[str, Any]) -> tuple[float, ...]:
        if group["amsgrad"]:
            raise ValueError("amsgrad=True was set after Lookbehind chose its fused path; build Lookbehind anew")
        decoupled = group.get("decoupled_weight_decay", isinstance(self.base, AdamW))
        common = group["weight_decay"], float(decoupled), float(group["maximize"]), 0.0, 0.0
        return *common, *group["betas"], group["eps"]

    def _is_view(self, slot: int, g: int, p: Tensor) -> bool:
        step = self.state[p].get("step")
        return isinstance(step, Tensor) and step.data_ptr() == self._flats[p.device].steps.data_ptr() + 4 * slot

    def _adopt(self, slot: int, g: int, p: Tensor, filled: object, old: list[Flat]) -> None:
        mine = self._flats[p.device].steps[slot]
        mine.copy_(torch.as_tensor(self.state[p].get("step", 0.0)).reshape(()), non_blocking=True)
        self.state[p]["step"] = mine

    def _make_states(self, active: list[tuple[int, int, int, Tensor]]) -> None:
        for slot, _, _, p in active:
            if not self.state[p]:
                step = self._flats[p.device].steps[slot]
                step.zero_()
                self.state[p].update(step=step, exp_avg=_zeros(p), exp_avg_sq=_zeros(p))


def _zeros(p: Tensor) -> Tensor:
    dtype = torch.float64 if p.dtype == torch.float64 else torch.float32
    return torch.zeros_like(p, dtype=dtype, memory_format=torch.preserve_format)


_TORCH: dict[type[Optimizer], type[TorchPlanning]] = {SGD: SgdPlanning, Adam: AdamPlanning, AdamW: AdamPlanning}
_OURS = (TAM, AdaTAM, AdaTAMW)

Base = TorchPlanning | TorqueOptimizer


def base_of(optimizer: Optimizer) -> Base:
    """The planning of ``optimizer``, which :func:`obstacle` has nothing against."""
    if isinstance(optimizer, TorqueOptimizer):
        return optimizer
    return _TORCH[type(optimizer)](optimizer)


def obstacle(optimizer: Optimizer) -> str:
    """What keeps ``optimizer`` from descending in a fused pass, or an empty string."""
    if type(optimizer) not in (*_TORCH, *_OURS):
        return f"{type(optimizer).__name__} has no fused descent"
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        for name in ("amsgrad", "differentiable"):
            if group.get(name):
                return f"{name}=True has no fused descent"
        if any(isinstance(beta, Tensor) for beta in group.get("betas", ())):
            return "betas in tensors have no fused descent"
    dtype = next((p.dtype for p in params if p.dtype not in _checks.DTYPES), None)
    if dtype is not None:
        return f"{dtype} parameters have no kernels"
    kinds = sorted({p.device.type for p in params})
    return f"parameters are on {' and '.join(kinds)}" if len(kinds) > 1 else ""
