"""Memory layouts: which tensors the kernels can walk as flat arrays, and copies for those they can't."""

from __future__ import annotations

import torch
from torch import Tensor


def _strides(t: Tensor) -> list[tuple[int, int]]:
    """(stride, size) of the dimensions that matter, smallest stride first."""
    return sorted((stride, size) for stride, size in zip(t.stride(), t.shape, strict=True) if size > 1)


def is_dense(t: Tensor) -> bool:
    """Whether the elements fill one stretch of memory, in whatever order."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in _strides(t):
        if stride != expected:
            return False
        expected *= size
    return True


def may_overlap(t: Tensor) -> bool:
    """Whether two elements may share memory, as in an expanded tensor."""
    if t.numel() == 0:
        return False
    last = 0  # largest offset reached by the dimensions so far
    for stride, size in _strides(t):
        if stride <= last:
            return True
        last += stride * (size - 1)
    return False


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Whether element i lies at the same place in both."""
    if a.is_contiguous() and b.is_contiguous():
        return True
    return _place(a) == _place(b)


def _place(t: Tensor) -> list[int]:
    return [stride if size > 1 else 0 for stride, size in zip(t.stride(), t.shape, strict=True)]


def laid_out_as(t: Tensor, model: Tensor) -> Tensor:
    """``t`` itself if it lies in memory as the dense ``model`` does, else a copy that does."""
    if same_layout(t, model):
        return t
    return torch.empty_like(model, dtype=t.dtype).copy_(t)
