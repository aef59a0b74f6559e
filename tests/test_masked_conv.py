"""Masked convolutions against a convolution of zeros: groups, geometry, memory formats, planted NaN."""

from __future__ import annotations

import pytest
import torch
from helpers import each_dtype, same_bits
from masked import SHARES, check, index

import torsion
from torsion.ops import _native
from torsion.ops._activations import ACTIVATIONS

linear, conv = torsion.ops.masked_linear, torsion.ops.masked_conv2d
needs_c = pytest.mark.skipif(_native.C is None, reason=_native.missing.get("_C", ""))
each_act = pytest.mark.parametrize("act", ACTIVATIONS)


CONVS = {
    "plain": dict(),
    "same": dict(padding="same"),
    "same-even": dict(padding="same", kernel=(2, 4)),
    "strided": dict(stride=(2, 1), padding=(1, 2), dilation=(1, 2)),
    "pointwise": dict(kernel=(1, 1)),
    "grouped": dict(groups=3, padding=1),
    "depthwise": dict(groups=12, padding=1),
    "multiplier": dict(groups=6, padding=1),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("name", CONVS)
@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("act", ["none", "relu", "silu"])
def test_convolutions_against_float64(name, shares, layout, act, either_way):
    options = dict(CONVS[name])
    kernel, groups = options.pop("kernel", (3, 3)), options.get("groups", 1)
    k, n = 12, 24
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(2, k, 9, 8).contiguous(memory_format=form)
    w = torch.randn(n, k // groups, *kernel) / (k // groups * kernel[0] * kernel[1]) ** 0.5
    i, o = index(k, shares[0]), index(n, shares[1], 1)
    check(
        conv, torsion.reference.masked_conv2d, [x, w, torch.randn(n)], i, o, k, n, 1, torch.float32, act=act, **options
    )


@each_dtype()
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_convolution_dtypes(dtype, layout, either_way):
    form = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    x = torch.randn(2, 12, 6, 5).to(dtype).contiguous(memory_format=form)
    tensors = [x, (torch.randn(10, 12, 3, 3) / 10).to(dtype), torch.randn(10).to(dtype)]
    check(
        conv, torsion.reference.masked_conv2d, tensors, index(12, 0.6), index(10, 0.6, 1), 12, 10, 1, dtype,
        act="relu", padding=1,
    )  # fmt: skip


def test_memory_format_is_that_of_the_dense_layer():
    w, i, o = torch.randn(8, 6, 3, 3), index(6, 0.6), index(8, 0.6, 1)
    for form in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 6, 5, 5).contiguous(memory_format=form)
        assert conv(x, w, None, i, o).is_contiguous(memory_format=form)
    assert conv(torch.randn(6, 5, 5), w, None, i, o, act="relu").shape == (8, 3, 3)


def test_compact_convolution():
    x, w, b = torch.randn(2, 6, 5, 5), torch.randn(8, 6, 3, 3), torch.randn(8)
    i, o = index(6, 0.6), index(8, 0.6, 1)
    full = conv(x, w, b, i, o, act="relu")
    compact = conv(x[:, i.long()], w, b, i, o, act="relu", x_compact=True, y_compact=True)
    assert same_bits(compact, full[:, o.long()].contiguous())
