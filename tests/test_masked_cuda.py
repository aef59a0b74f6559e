"""Masked layers on a GPU: values and gradients of the CPU in float64, with NaN planted in all that is dead."""

from __future__ import annotations

import pytest
import torch
from helpers import each_dtype
from masked import SUMS, index, leaves, plant
from tolerances import close
from torch import Tensor

import torsion

pytestmark = [pytest.mark.cuda, pytest.mark.backend("cuda")]
DEVICE = "cuda"

LAYERS = {
    "linear": (torsion.ops.masked_linear, (30, 40), (24, 40), {}),
    "conv": (torsion.ops.masked_conv2d, (4, 40, 9, 9), (24, 40, 3, 3), {"padding": 1}),
    "grouped conv": (torsion.ops.masked_conv2d, (4, 40, 9, 9), (24, 10, 3, 3), {"padding": 1, "groups": 4}),
}
SHARES = [(0.5, 0.5), (0.95, 0.95), (0.3, 1.0), (1.0, 0.3), (0.0, 0.5), (0.5, 0.0)]


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def results(layer: object, tensors: list[Tensor], lists: list[Tensor], dy: Tensor, **options: object) -> list[Tensor]:
    taken = leaves(*tensors)
    y = layer(*taken, *lists, **options)  # type: ignore[operator]
    y.backward(dy)
    return [y.detach(), *(t.grad for t in taken)]  # type: ignore[list-item]


@each_dtype()
@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_as_on_the_cpu(name, shares, act, dtype):
    layer, shape, weight, options = LAYERS[name]
    torch.manual_seed(0)
    x, w, b = (torch.randn(s).to(dtype) for s in (shape, weight, weight[:1]))
    lists = [index(shape[1], shares[0]), index(weight[0], shares[1], 1)]
    dy = torch.randn(layer(x, w, b, *lists, act=act, **options).shape).to(dtype)
    wide = results(layer, [t.double() for t in (x, w, b)], lists, dy.double(), act=act, **options)
    planted = [t.clone() for t in (x, w, b, dy)]
    plant(planted, *lists, shape[1], weight[0], 1, torch.nan)
    *tensors, dy = (t.to(DEVICE) for t in planted)
    found = results(layer, tensors, [i.to(DEVICE) for i in lists], dy, act=act, **options)
    for a, e in zip(found, wide, strict=True):
        assert a.dtype == dtype
        close(a, e, SUMS[dtype])


def test_all_live_is_the_dense_layer_bit_for_bit():
    x, w, b = (torch.randn(s, device=DEVICE) for s in ((64, 96), (80, 96), (80,)))
    live = torch.arange(96, dtype=torch.int32, device=DEVICE)
    assert torch.equal(torsion.ops.masked_linear(x, w, b, live), torch.nn.functional.linear(x, w, b))
