"""Activations of masked layers, applied to live outputs only: what is saved for the backward, and the backward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torsion.ops._blocks import keep_bits_, relu_bits_

ACTIVATIONS = ("none", "relu", "gelu", "silu")


def plain(z: Tensor, act: str) -> Tensor:
    """Torch's own activation, for layers of which all is live."""
    if act == "relu":
        return F.relu(z)
    if act == "gelu":
        return F.gelu(z)
    return F.silu(z) if act == "silu" else z


def apply(z: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """The activation of ``z``, which may be overwritten, and what :func:`backward` needs of it.

    Returns:
        ``act(z)`` and: bits for ReLU (1 bit an element), z for GELU and SiLU, nothing for none.
    """
    if act == "none":
        return z, z.new_empty(0)
    if act == "relu":
        bits = relu_bits_(z)
        return z, bits
    return plain(z, act), z


def backward(dy: Tensor, saved: Tensor, act: str, owned: bool) -> Tensor:
    """Gradient of z from that of the activation.

    Args:
        dy: laid out as z was.
        saved: see :func:`apply`.
        act: the activation.
        owned: ``dy`` may be overwritten.
    """
    if act == "none":
        return dy
    if act == "relu":
        return keep_bits_(dy if owned else dy.clone(), saved)
    if act == "gelu":
        return torch.ops.aten.gelu_backward(dy, saved)  # type: ignore[no-any-return]
    return torch.ops.aten.silu_backward(dy, saved)  # type: ignore[no-any-return]


def saved_shape(act: str, shape: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
    """Shape of what :func:`apply` saves for z of ``shape``, and whether it is bits."""
    if act == "none":
        return (0,), False
    if act == "relu":
        n = 1
        for size in shape:
            n = n * size
        return ((n + 7) // 8,), True
    return shape, False
