"""Masked layers with the batch normalization and the activation behind them."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from torsion.ops import _activations
from torsion.ops.masked import all_live, masked_linear
from torsion.ops.masked_conv import Pair, masked_conv2d

Stats = tuple[Tensor | None, Tensor | None]


def masked_linear_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    in_idx: Tensor | None = None,
    out_idx: Tensor | None = None,
    act: str = "relu",
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    x_compact: bool = False,
    y_compact: bool = False,
) -> Tensor:
    """``act(batch_norm(x @ weight.T + bias))`` on live units only, with autograd (DemP, arXiv 2403.07688).

    Batch normalization treats every unit by itself, so leaving out the dead changes nothing for the living. Entries of
    dead units in ``gamma``, ``beta`` and the running statistics are neither read nor written, their gradients are 0.

    Args:
        x: ``[..., K]``; statistics are taken over all leading dims. See :func:`masked_linear` for this, ``weight``,
            ``bias``, the lists, ``act``, ``x_compact`` and ``y_compact``.
        weight: ``[N, K]``.
        bias: ``[N]``, or None.
        gamma: scale ``[N]``, or None for 1.
        beta: shift ``[N]``, or None for 0.
        running_mean: ``[N]``, updated in place in training; None: none is kept. So is ``running_var``.
        running_var: ``[N]``.
        in_idx: int32 ``[K']``, live inputs; None: all.
        out_idx: int32 ``[N']``, live outputs; None: all.
        act: "none", "relu", "gelu" or "silu".
        training: statistics of the batch, as in ``F.batch_norm``, instead of the running ones.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        x_compact: x holds the live inputs only.
        y_compact: return the live outputs only.

    Returns:
        ``[..., N]``, 0 where dead, or ``[..., N']``.

    Raises:
        ValueError: as :func:`masked_linear` and ``F.batch_norm``; evaluation without running statistics.
        TypeError: as :func:`masked_linear`.
    """
    _check("masked_linear_bn_act", act, weight.shape[0], gamma, beta, (running_mean, running_var), training)
    z = masked_linear(x, weight, bias, in_idx, out_idx, x_compact=x_compact, y_compact=True)
    rows = z.reshape(math.prod(z.shape[:-1]), z.shape[-1])
    y = _normalized(rows, gamma, beta, (running_mean, running_var), out_idx, weight.shape[0], training, momentum, eps)
    y = _activations.plain(y, act).view_as(z)
    return y if y_compact else _spread(y, out_idx, weight.shape[0], -1)


def masked_conv2d_bn_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    in_idx: Tensor | None = None,
    out_idx: Tensor | None = None,
    stride: Pair = 1,
    padding: Pair | str = 0,
    dilation: Pair = 1,
    groups: int = 1,
    act: str = "relu",
    *,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    x_compact: bool = False,
    y_compact: bool = False,
) -> Tensor:
    """``act(batch_norm(conv2d(x, weight, bias)))`` on live channels only; see :func:`masked_linear_bn_act`.

    Args:
        x: ``[B, K, H, W]``. See :func:`masked_conv2d` for this, ``weight``, ``bias``, the lists, the geometry, ``act``,
            ``x_compact`` and ``y_compact``.
        weight: ``[N, K / groups, kh, kw]``.
        bias: ``[N]``, or None.
        gamma: scale ``[N]``, or None for 1.
        beta: shift ``[N]``, or None for 0.
        running_mean: ``[N]``, updated in place in training; None: none is kept. So is ``running_var``.
        running_var: ``[N]``.
        in_idx: int32 ``[K']``, live input channels; None: all.
        out_idx: int32 ``[N']``, live output channels; None: all.
        stride: as for ``F.conv2d``, like the next three.
        padding: of x.
        dilation: of the kernel.
        groups: of the convolution.
        act: "none", "relu", "gelu" or "silu".
        training: statistics of the batch instead of the running ones.
        momentum: weight of the batch in the running statistics.
        eps: added to the variance.
        x_compact: x holds the live channels only; not with groups.
        y_compact: return the live channels only; not with groups.

    Returns:
        ``[B, N, Ho, Wo]``, 0 where dead, or ``[B, N', Ho, Wo]``.

    Raises:
        ValueError: as :func:`masked_conv2d` and ``F.batch_norm``; evaluation without running statistics.
        TypeError: as :func:`masked_conv2d`.
    """
    op, n = "masked_conv2d_bn_act", weight.shape[0]
    _check(op, act, n, gamma, beta, (running_mean, running_var), training)
    if x.dim() != 4:
        raise ValueError(f"{op}: x must be [B, K, H, W], is {list(x.shape)}")
    compact = y_compact or groups == 1
    z = masked_conv2d(
        x, weight, bias, in_idx, out_idx, stride, padding, dilation, groups, x_compact=x_compact, y_compact=compact
    )
    z = z if compact or out_idx is None else z.index_select(1, out_idx)
    y = _normalized(z, gamma, beta, (running_mean, running_var), out_idx, n, training, momentum, eps)
    y = _activations.plain(y, act)
    return y if y_compact else _spread(y, out_idx, n, 1)


def _check(
    op: str, act: str, n: int, gamma: Tensor | None, beta: Tensor | None, running: Stats, training: bool
) -> None:
    if act not in _activations.ACTIVATIONS:
        raise ValueError(f"{op}: act={act!r} is unknown; use one of {', '.join(_activations.ACTIVATIONS)}")
    for name, t in zip(("gamma", "beta", "running_mean", "running_var"), (gamma, beta, *running), strict=True):
        if t is not None and t.shape != (n,):
            raise ValueError(f"{op}: {name} must have shape [{n}], has {list(t.shape)}")
    if (running[0] is None) != (running[1] is None):
        raise ValueError(f"{op}: running_mean and running_var are kept both or neither")
    if not training and running[0] is None:
        raise ValueError(f"{op}: training=False needs running_mean and running_var")


def _normalized(
    z: Tensor, gamma: Tensor | None, beta: Tensor | None, running: Stats, out_idx: Tensor | None, n: int,
    training: bool, momentum: float, eps: float,
) -> Tensor:  # fmt: skip
    """Batch normalization of live channels, which lie in dim 1."""
    if all_live(out_idx, n) or out_idx is None:
        return F.batch_norm(z, *running, gamma, beta, training, momentum, eps)
    if out_idx.shape[0] == 0:
        return z
    mean, var, scale, shift = (None if t is None else t.index_select(0, out_idx) for t in (*running, gamma, beta))
    y = F.batch_norm(z, mean, var, scale, shift, training, momentum, eps)
    if training:
        for whole, part in zip(running, (mean, var), strict=True):
            if whole is not None and part is not None:
                whole.index_copy_(0, out_idx.long(), part)
    return y


def _spread(y: Tensor, out_idx: Tensor | None, n: int, dim: int) -> Tensor:
    """Zeros where units are dead; of the incoming gradient these are not read."""
    if out_idx is None or all_live(out_idx, n):
        return y
    if y.dim() == 4 and dim == 1 and not y.is_contiguous():
        return _spread(y.permute(0, 2, 3, 1), out_idx, n, -1).permute(0, 3, 1, 2)
    shape = list(y.shape)
    shape[dim] = n
    return y.new_zeros(shape).index_copy(dim, out_idx.long(), y)
