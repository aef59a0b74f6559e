"""The lasso on normalization scales: lambda * sign(gamma), added to their gradients around the optimizer's step."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from torsion.optim._torque import TorqueOptimizer

_NORMS = (
    nn.modules.batchnorm._NormBase,  # BatchNorm, SyncBatchNorm and InstanceNorm of all dimensions
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
_NAMED_NORM = re.compile(r"Norm(\d+[dD])?$")


def scales(model: nn.Module) -> dict[str, nn.Module]:
    """The normalization modules of ``model`` that have a scale (``weight``), by name.

    Classes other than torch's count by their name: one that ends in "Norm" and has a weight of one dimension, such as
    the RMSNorm of many language models.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        if weight is None:
            continue
        named = _NAMED_NORM.search(type(module).__name__) is not None and weight.dim() == 1
        if isinstance(module, _NORMS) or named:
            found[name] = module
    return found


@dataclass(eq=False)
class _Changed:
    """A gradient with the lasso in it, as it was left; ``users`` is the tensor that it stands in for, if any."""

    param: Tensor
    grad: Tensor
    users: Tensor | None = None
    version: int = 0

    @property
    def untouched(self) -> bool:
        return self.param.grad is self.grad and self.grad._version == self.version


class Lasso:
    """Adds the lasso's gradient before a step; where ``p.grad`` is to stay the user's, takes it out again after it."""

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Find the scales; a cut replaces their parameters, not the modules."""
        self._modules = list(scales(model).values())
        self._optimizer = optimizer
        self._changed: list[_Changed] = []
        self.in_kernel: float | Tensor | None = None  # the weight, where the optimizer's kernels add the lasso

    def parameters(self) -> list[Tensor]:
        """The scales, each once."""
        return list(dict.fromkeys(p for m in self._modules if (p := m._parameters.get("weight")) is not None))

    def add(self, weight: float | Tensor) -> None:
        """Add ``weight * sign(p)`` to the gradient of every scale that has one, times the scale of the gradients.

        In a group that maximizes it is subtracted: the scales shrink all the same.
        """
        # Whatever is left from a step that raised: its gradients hold the lasso already, unless they are new.
        left = [c for c in self._changed if c.untouched]
        done = {id(c.param) for c in left}
        new: list[_Changed] = []
        for p in self.parameters():
            if p.grad is not None and id(p) not in done:
                new.append(self._exchanged(p) if isinstance(self._optimizer, TorqueOptimizer) else _Changed(p, p.grad))
        self._changed = left + new
        self._add([c.grad for c in new], [c.param for c in new], weight)
        for c in new:
            c.version = c.grad._version

    @staticmethod
    def _exchanged(p: Tensor) -> _Changed:
        users = p.grad
        assert users is not None
        p.grad = users.detach().clone()
        return _Changed(p, p.grad, users)

    def _add(self, grads: list[Tensor], params: list[Tensor], weight: float | Tensor) -> None:
        if not params:
            return
        scale = getattr(self._optimizer, "grad_scale", None)
        if scale is not None:
            weight = weight * scale
        signs = self._signs(params)
        if not isinstance(weight, Tensor):
            torch._foreach_add_(grads, signs, alpha=weight)
            return
        for device in {g.device for g in grads}:
            here = [i for i, g in enumerate(grads) if g.device == device]
            torch._foreach_mul_([signs[i] for i in here], weight.reshape(()).to(device, non_blocking=True))
        torch._foreach_add_(grads, signs)

    def _signs(self, params: list[Tensor]) -> list[Tensor]:
        signs = list(torch._foreach_sign(params))
        ascends = {id(p) for g in self._optimizer.param_groups if g.get("maximize") for p in g["params"]}
        for sign, p in zip(signs, params, strict=True):
            if id(p) in ascends:
                sign.neg_()
        return signs

    def gradient_scale(self, device: torch.device) -> float | Tensor:
        """What the gradients are multiplied by while the optimizer gets them scaled, else 1."""
        scale = getattr(self._optimizer, "grad_scale", None)
        return 1.0 if scale is None else scale.reshape(()).to(device, non_blocking=True)

    def total(self, p: Tensor) -> Tensor | None:
        """The gradient of ``p`` with the lasso, also where only the kernels add it; None: there is none."""
        if p.grad is None or self.in_kernel is None or all(p is not q for q in self.parameters()):
            return p.grad
        weight = torch.as_tensor(self.in_kernel, dtype=p.grad.dtype).to(p.device, non_blocking=True)
        return p.grad + weight * self.gradient_scale(p.device) * self._signs([p])[0]

    def remove(self) -> None:
        """After the step: every gradient that was exchanged is the user's again."""
        for c in self._changed:
            if c.users is not None and c.param.grad is c.grad:
                c.param.grad = c.users
        self._changed = []

    def forget(self) -> None:
        """Before DemP goes: leave no lasso behind for steps to come."""
        self._changed = [c for c in self._changed if c.untouched]
        self.remove()
