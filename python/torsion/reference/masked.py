"""Layers on live units only, in plain PyTorch (DemP, arXiv 2403.07688); twice differentiable.

    z[:, j] = X[:, in] W[out_j, in]^T + b[out_j];  Y[:, out] = act(z),  Y[:, dead] = 0

What is dead is neither read nor does it get a gradient other than 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def _activate(z: Tensor, act: str) -> Tensor:
    """``act`` with the names of the ops; gelu is the erf form."""
    if act == "relu":
        return F.relu(z)
    if act == "gelu":
        return F.gelu(z)
    return F.silu(z) if act == "silu" else z


def _index(index: Tensor | None, size: int, device: torch.device) -> Tensor:
    return torch.arange(size, device=device) if index is None else index.long()


def masked_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_idx: Tensor | None = None,
    out_idx: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    """See :func:`torsion.ops.masked_linear`."""
    inp, out = _index(in_idx, weight.shape[1], x.device), _index(out_idx, weight.shape[0], x.device)
    z = x.index_select(-1, inp) @ weight.index_select(0, out).index_select(1, inp).t()
    if bias is not None:
        z = z + bias.index_select(0, out)
    return z.new_zeros(*x.shape[:-1], weight.shape[0]).index_copy(-1, out, _activate(z, act))


def masked_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    in_idx: Tensor | None = None,
    out_idx: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    act: str = "none",
) -> Tensor:
    """See :func:`torsion.ops.masked_conv2d`. Computed as a convolution of zeros where something is dead."""
    inp, out = _index(in_idx, weight.shape[1] * groups, x.device), _index(out_idx, weight.shape[0], x.device)
    whole = torch.zeros_like(x).index_copy(-3, inp, x.index_select(-3, inp))
    w = torch.zeros_like(weight).index_copy(0, out, weight.index_select(0, out))
    live = torch.zeros(weight.shape[1] * groups, dtype=torch.bool, device=x.device).index_fill(0, inp, True)
    group = torch.arange(weight.shape[0], device=x.device) // (weight.shape[0] // groups)
    w = torch.where(live.view(groups, -1)[group][:, :, None, None], w, torch.zeros_like(w))
    z = F.conv2d(whole, w, None, stride, padding, dilation, groups).index_select(-3, out)
    if bias is not None:
        z = z + bias.index_select(0, out).view(-1, 1, 1)
    shape = [weight.shape[0] if d == z.dim() - 3 else size for d, size in enumerate(z.shape)]
    return z.new_zeros(shape).index_copy(-3, out, _activate(z, act))


def layer_norm_live(x: Tensor, width: int, eps: float = 1e-5) -> Tensor:
    """LayerNorm, no affine map, of ``[..., D']`` live features among ``width``, the others being 0; exact on them."""
    mean = x.sum(-1, keepdim=True) / width
    squares = (x - mean).square().sum(-1, keepdim=True) + (width - x.shape[-1]) * mean.square()
    return (x - mean) / (squares / width + eps).sqrt()


def rms_norm_live(x: Tensor, width: int, eps: float = 1e-5) -> Tensor:
    """RMSNorm, without scale, of ``[..., D']`` live features among ``width``, the others being 0."""
    return x / (x.square().sum(-1, keepdim=True) / width + eps).sqrt()


def group_norm_live(x: Tensor, live: Tensor, width: int, groups: int, eps: float = 1e-5) -> Tensor:
    """GroupNorm, no affine map, of ``[B, C', ...]``: ``live`` (int ``[C']``) of ``width`` channels, others 0."""
    size = width // groups * x[0, 0].numel()  # numbers of a group, the virtual ones too
    member = torch.nn.functional.one_hot(live.long() // (width // groups), groups).to(x.dtype)  # [C', groups]
    flat = x.reshape(*x.shape[:2], -1)
    mean = flat.sum(2) @ member / size
    variance = flat.square().sum(2) @ member / size - mean.square()
    mean, variance = (t @ member.t() for t in (mean, variance))
    return ((flat - mean.unsqueeze(2)) / (variance + eps).sqrt().unsqueeze(2)).view_as(x)
