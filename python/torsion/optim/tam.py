"""TAM: SGD with momentum whose gradient is damped by its angle to the momentum."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torsion.ops._rules import TAM as RULE
from torsion.optim import _checks
from torsion.optim._torque import TorqueOptimizer


class TAM(TorqueOptimizer):
    r"""Torque-aware momentum (arXiv 2412.18790), a drop-in for ``torch.optim.SGD(momentum=...)``.

    With s the cosine between old momentum m and new gradient g over the scope, and s^ its running mean::

        s^ = decay s^ + (1 - decay) s
        m  = momentum m + (eps_damping + (1 + s^) / 2) (g + weight_decay theta)
        theta = theta - lr m

    **Learning rate.** Where s^ settles at s*, TAM moves like SGD at lr (1 + s*) / 2. Coming from SGD with momentum,
    multiply its rate by 2 / (1 + s*): by 2 for noisy gradients (s* near 0), by 1 for nearly constant ones. A warm-up or
    schedule carries over unchanged.

    Args:
        params: parameters, groups of them, or ``named_parameters()``; float32, float64, bfloat16 or float16. State is
            float32 (float64 for float64).
        lr: learning rate >= 0, a number or a tensor of one element (then a change never recompiles or copies).
        momentum: factor of the old momentum, in [0, 1).
        weight_decay: >= 0; added to the gradient, not to the cosine.
        decay: smoothing of the cosine, in [0, 1]; 1 keeps the damping at 1/2 and gives SGD at lr / 2.
        eps_damping: floor of the damping, >= 0.
        decoupled_weight_decay: shrink the parameter by 1 - lr weight_decay instead.
        scope: tensors that share one cosine: "global", "group" or "tensor".
        init: "zero" starts from m = 0; "clone" takes each tensor's first gradient as its momentum, undamped (the
            authors' code does, with scope="group").
        max_grad_norm: clip all gradients together to this norm, inside the step; ``p.grad`` stays as it is.
        maximize: ascend.
        stochastic_rounding: round bfloat16 and float16 parameters up or down at random, so that small updates are not
            lost; reproducible from torch's seed at construction (``sr_seed`` in the groups, which ranks that hold
            copies of a parameter must have in common).
        backend: "cuda", "triton", "cpu" or "reference"; the best for the device when None.

    Raises:
        ValueError: an argument is out of range, or groups disagree where they must not.
        TypeError: a value of the wrong kind, or an argument of torch's that does not apply (the message says why).

    Checkpoints of ``torch.optim.SGD`` load, and load back. A non-finite gradient skips the whole step.
    """

    _rule = RULE

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        *,
        decay: float = 0.9,
        eps_damping: float = 1e-8,
        decoupled_weight_decay: bool = False,
        scope: str = "global",
        init: str = "zero",
        max_grad_norm: float | None = None,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        backend: str | None = None,
        **untaken: object,
    ) -> None:
        """See the class."""
        defaults = dict(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            decay=decay,
            eps_damping=eps_damping,
            decoupled_weight_decay=decoupled_weight_decay,
            scope=scope,
            init=init,
            max_grad_norm=max_grad_norm,
            maximize=maximize,
            stochastic_rounding=stochastic_rounding,
            sr_seed=None,
            # torch.optim.SGD needs these in the groups it loads.
            dampening=0,
            nesterov=False,
            foreach=None,
            differentiable=False,
            fused=None,
        )
        super().__init__(params, defaults, backend, untaken)

    def _check_numbers(self, where: str, group: dict[str, Any]) -> None:
        super()._check_numbers(where, group)
        _checks.fraction(where, "momentum", group["momentum"], closed=False)

    def _group_numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        return group["momentum"], group["decay"], group["eps_damping"], float(group["init"] == "clone")
