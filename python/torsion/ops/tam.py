"""The TAM op; rule in ``csrc/rules/tam.h``, specification in :mod:`torsion.reference`."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from torsion.ops._dispatch import run_
from torsion.ops._frame import Step
from torsion.ops._rules import TAM


def tam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
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
    """One step of torque-aware momentum over a list of n tensors of one device, in place (arXiv 2412.18790).

    ``torch.ops.torsion.tam_`` is the same op with every argument by position. Two passes over memory: 28 bytes per
    float32 element. Nothing waits for the device.

    Args:
        params: n dense tensors, float32, float64, bfloat16 or float16; updated.
        grads: n tensors with their parameter's dtype, sizes and strides; read.
        momentum_buffers: n tensors laid out as the parameters, float32 (float64 for float64 parameters); updated.
        shared: ``[S, 3]`` float32 or float64: smoothed cosine, last cosine, damping of each scope; updated.
        steps: ``[m]`` float32, steps taken by each tensor; updated.
        status: ``[4]`` int64: steps skipped, bits of the float64 gradient norm, whether this step was skipped, bits of
            the float64 clipping factor; updated.
        hyper: ``[G, 10]`` float64 on the CPU: lr, weight_decay, decoupled, maximize, stochastic, seed, momentum, decay,
            eps_damping, clone. lr in units of the update, the rest without unit; flags are 0 or 1.
        scopes: row of ``shared`` for each tensor.
        groups: row of ``hyper`` for each tensor.
        slots: index into ``steps`` and number of the random stream for each tensor; 0 ... n - 1 when None.
        lrs: learning rates held in tensors of one element, for the groups whose lr is NaN in ``hyper``, in order.
        grad_scale: one float32 number on the device by which gradients are divided.
        found_inf: one float32 number on the device; not 0 skips the step.
        max_grad_norm: clip all gradients together to this norm inside the step; ``grads`` stay as they are.
        backend: "cuda", "triton", "cpu" or "reference"; TORSION_BACKEND or the best for the device when None.

    Raises:
        ValueError: the back end is unknown or cannot run here.
        RuntimeError: tensors whose dtype, layout, device or number do not fit, named by list and position.
    """
    slots = range(len(params)) if slots is None else slots
    step = Step(
        list(params), list(grads), [list(momentum_buffers)], shared, steps, status, hyper, list(lrs),
        list(scopes), list(groups), list(slots), grad_scale, found_inf, max_grad_norm,
    )  # fmt: skip
    run_(TAM, step, backend)
