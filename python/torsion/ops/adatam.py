"""The AdaTAM op; rule in ``csrc/rules/adatam.h``, specification in :mod:`torsion.reference`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torsion.ops._dispatch import run_
from torsion.ops._frame import Step
from torsion.ops._rules import ADATAM


def adatam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    shared: Tensor,
    steps: Tensor,
    status: Tensor,
    hyper: Tensor,
    *,
    scopes: Sequence[int],
    groups: Sequence[int],
    slots: Sequence[int] | None = None,
    lrs: Sequence[Tensor] = (),
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    max_grad_norm: float | None = None,
    backend: str | None = None,
) -> None:
    """One step of AdaTAM or AdaTAMW over a list of n tensors of one device, in place (arXiv 2412.18790).

    ``torch.ops.torsion.adatam_`` is the same op with every argument by position. Two passes over memory: 36 bytes per
    float32 element. Arguments not named here are those of :func:`torsion.ops.tam_`.

    Args:
        params: n dense tensors, float32, float64, bfloat16 or float16; updated.
        grads: n tensors with their parameter's dtype, sizes and strides; read.
        exp_avgs: n tensors laid out as the parameters, float32 (float64 for float64 parameters): the damped heavy-ball
            momentum, a sum and not an average; updated.
        exp_avg_sqs: n tensors like ``exp_avgs``: running average of the squared gradient; updated.
        shared: ``[S, 3]`` float32 or float64; updated.
        steps: ``[m]`` float32; updated.
        status: ``[4]`` int64; updated.
        hyper: ``[G, 12]`` float64 on the CPU: lr, weight_decay, decoupled, maximize, stochastic, seed, beta1, beta2,
            eps, decay, eps_damping, bias_correction.
        scopes: row of ``shared`` for each tensor.
        groups: row of ``hyper`` for each tensor.
        slots: index into ``steps`` and number of the random stream for each tensor; 0 ... n - 1 when None.
        lrs: learning rates held in tensors, for the groups whose lr is NaN in ``hyper``, in order.
        grad_scale: one float32 number on the device by which gradients are divided.
        found_inf: one float32 number on the device; not 0 skips the step.
        max_grad_norm: clip all gradients together to this norm inside the step.
        backend: "cuda", "triton", "cpu" or "reference"; TORSION_BACKEND or the best for the device when None.

    Raises:
        ValueError: the back end is unknown or cannot run here.
        RuntimeError: tensors whose dtype, layout, device or number do not fit, named by list and position.
    """
    slots = range(len(params)) if slots is None else slots
    step = Step(
        list(params), list(grads), [list(exp_avgs), list(exp_avg_sqs)], shared, steps, status, hyper, list(lrs),
        list(scopes), list(groups), list(slots), grad_scale, found_inf, max_grad_norm,
    )  # fmt: skip
    run_(ADATAM, step, backend)
