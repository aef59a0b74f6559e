"""AdaTAM and AdaTAMW: Adam whose first moment is TAM's damped momentum."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from torsion.ops._rules import ADATAM
from torsion.optim import _checks
from torsion.optim._torque import TorqueOptimizer


class AdaTAM(TorqueOptimizer):
    r"""Adaptive torque-aware momentum (arXiv 2412.18790), a drop-in for ``torch.optim.Adam``.

    With s^ the smoothed cosine between momentum and gradient (see :class:`torsion.TAM`)::

        m = beta1 m + (eps_damping + (1 + s^) / 2) (g + weight_decay theta)
        v = beta2 v + (1 - beta2) g^2
        theta = theta - lr m / (sqrt(v) + eps)

    **Learning rate.** m is a sum, not an average: up to 1 / (1 - beta1) times Adam's. Settled steps are 5 to 10 times
    Adam's at the same rate, so take 0.1 to 0.2 of Adam's rate. Without bias correction v starts small and the first
    steps are larger still: 16 times lr at step 1, 53 at step 22, 32 at step 100. Warm up over at least 1 / (1 - beta2)
    steps (1000), or pass ``bias_correction=True``, which starts at 1/2 and needs no warm-up of its own.

    Args:
        params: parameters, groups of them, or ``named_parameters()``; float32, float64, bfloat16 or float16. State is
            float32 (float64 for float64).
        lr: learning rate >= 0, a number or a tensor of one element.
        betas: factor of the old momentum and of the old second moment, each in [0, 1).
        eps: added to the root of the second moment, >= 0.
        weight_decay: >= 0; added to the gradient that feeds the momentum, neither to the cosine nor to v.
        decay: smoothing of the cosine, in [0, 1].
        eps_damping: floor of the damping, >= 0.
        bias_correction: divide v by 1 - beta2^t; no source of the method does.
        scope: tensors that share one cosine: "global", "group" or "tensor".
        max_grad_norm: clip all gradients together to this norm, inside the step; ``p.grad`` stays as it is.
        maximize: ascend.
        stochastic_rounding: round bfloat16 and float16 parameters at random; see :class:`torsion.TAM`.
        backend: "cuda", "triton", "cpu" or "reference"; the best for the device when None.

    Raises:
        ValueError: an argument is out of range, or groups disagree where they must not.
        TypeError: a value of the wrong kind, or an argument of torch's that does not apply (the message says why).

    Checkpoints of ``torch.optim.Adam`` and ``AdamW`` load, and load back. ``exp_avg`` crosses as it stands, an average
    there and a sum here, up to 1 / (1 - beta1) apart: expect some tens of steps until it has the method's own size.
    """

    _rule = ADATAM
    _own_keys = ("decoupled_weight_decay",)
    _decoupled = False

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        decay: float = 0.9,
        eps_damping: float = 1e-8,
        bias_correction: bool = False,
        scope: str = "global",
        max_grad_norm: float | None = None,
        maximize: bool = False,
        stochastic_rounding: bool = False,
        backend: str | None = None,
        **untaken: object,
    ) -> None:
        """See the class."""
        defaults = dict(
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decay=decay,
            eps_damping=eps_damping,
            bias_correction=bias_correction,
            decoupled_weight_decay=self._decoupled,
            scope=scope,
            max_grad_norm=max_grad_norm,
            maximize=maximize,
            stochastic_rounding=stochastic_rounding,
            sr_seed=None,
            # torch.optim.Adam and AdamW need these in the groups they load.
            amsgrad=False,
            foreach=None,
            capturable=False,
            differentiable=False,
            fused=None,
        )
        super().__init__(params, defaults, backend, untaken)

    def _check_numbers(self, where: str, group: dict[str, Any]) -> None:
        super()._check_numbers(where, group)
        _checks.at_least_zero(where, "eps", group["eps"])
        _checks.flag(where, "bias_correction", group["bias_correction"])
        for k, beta in enumerate(_checks.pair(where, "betas", group["betas"])):
            _checks.fraction(where, f"betas[{k}]", beta, closed=False)

    def _group_numbers(self, group: dict[str, Any]) -> tuple[float, ...]:
        beta1, beta2 = group["betas"]
        return beta1, beta2, group["eps"], group["decay"], group["eps_damping"], float(group["bias_correction"])


class AdaTAMW(AdaTAM):
    """AdaTAM with decoupled weight decay, a drop-in for ``torch.optim.AdamW``.

    The parameter is first multiplied by 1 - lr weight_decay, and the momentum takes the gradient alone. At 0.1 to 0.2
    of AdamW's learning rate (see :class:`AdaTAM`) the decay per step shrinks as much: raise ``weight_decay`` by the
    inverse to keep it. Arguments and errors are those of :class:`AdaTAM`.
    """

    _decoupled = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **kwargs: Any,
    ) -> None:
        """See the class."""
        super().__init__(params, lr, betas, eps, weight_decay, **kwargs)
