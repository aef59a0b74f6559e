"""The fused masked layer in Triton against float64, with NaN wherever it has no business to read.

In the interpreter where there is no GPU, so tensors are small and of odd sizes.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from helpers import bits, each_dtype, same_bits
from test_demp_ops import some
from tolerances import Row, close

import torsion

if not importlib.util.find_spec("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)
from torsion.triton_kernels import engine, masked

pytestmark = [
    pytest.mark.triton,
    pytest.mark.backend("triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
DEVICE = "cpu" if engine.INTERPRETED else "cuda"
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAN = float("nan")


def dense(x, w, b, inputs, outputs, act, x_compact=False):
    """In float64: z of the live outputs, and y of all."""
    inp = torch.arange(w.shape[1], device=w.device) if inputs is None else inputs.long()
    out = torch.arange(w.shape[0], device=w.device) if outputs is None else outputs.long()
    live = x.double() if x_compact else x.double()[..., inp]
    z = live @ w.double()[out][:, inp].T + (0 if b is None else b.double()[out])
    y = {"none": lambda t: t, "relu": torch.relu, "gelu": torch.nn.functional.gelu, "silu": torch.nn.functional.silu}
    full = z.new_zeros(*x.shape[:-1], w.shape[0])
    full[..., out] = y[act](z)
    return z, full


PRODUCT = {
    F32: Row(1e-5, scale=1e-6, why="a sum of some dozen products in float32"),
    BF16: Row(2.0**-8, scale=1e-6, why="one rounding to 8 bits of a float32 sum"),
    F16: Row(2.0**-11, scale=1e-6, why="one rounding to 11 bits of a float32 sum"),
}


def layer(m, k, n, live_in, live_out, dtype, lead=()):
    """Operands with NaN wherever the layer has no business to read."""
    x, w, b = torch.randn(*lead, m, k), torch.randn(n, k), torch.randn(n)
    inputs = None if live_in is None else some(k, live_in).int()
    outputs = None if live_out is None else some(n, live_out, 2).int()
    if inputs is not None:
        dead = torch.ones(k, dtype=torch.bool)
        dead[inputs.long()] = False
        x[..., dead] = w[:, dead] = NAN
    if outputs is not None:
        dead = torch.ones(n, dtype=torch.bool)
        dead[outputs.long()] = False
        w[dead] = b[dead] = NAN
    moved = [None if t is None else t.to(DEVICE) for t in (inputs, outputs)]
    return *(t.to(DEVICE, dtype) for t in (x, w, b)), *moved


def unpacked(saved, n):
    return ((saved.unsqueeze(1).int() >> torch.arange(8, device=saved.device)) & 1).flatten()[:n].bool()


SIZES = {
    "odd": (37, 45, 27, 19, 13),
    "whole bytes": (5, 70, 90, 33, 72),
    "several tiles": (150, 40, 200, 33, 133),
    "all": (3, 17, 9, None, None),
    "inputs": (9, 50, 24, 21, None),
    "outputs": (9, 50, 24, None, 5),
    "full lists": (4, 6, 8, 6, 8),
    "one": (1, 1, 1, 1, 1),
    "no output": (3, 5, 7, 2, 0),
    "no input": (3, 5, 7, 0, 4),
    "no row": (0, 5, 7, 3, 4),
}


@pytest.mark.parametrize(
    ("size", "dtype"), [*((s, F32) for s in SIZES), ("odd", BF16), ("several tiles", BF16), ("odd", F16)], ids=str
)
def test_layer_with_relu(size, dtype):
    """Dead entries are nowhere used, dead outputs are 0, the bits say which live outputs are above it."""
    x, w, b, inputs, outputs = layer(*SIZES[size], dtype)
    _, full = dense(x, w, b, inputs, outputs, "relu")
    out = slice(None) if outputs is None else outputs.long()
    y, saved = masked.masked_linear_forward(x, w, b, inputs, outputs, "relu", False, False, True)
    close(y, full, PRODUCT[dtype])
    alone, same = masked.masked_linear_forward(x, w, b, inputs, outputs, "relu", False, True, False)
    assert same_bits([alone, same], [y[:, out].contiguous(), saved])
    if inputs is not None:
        few = x[:, inputs.long()]
        assert same_bits([masked.masked_linear_forward(few, w, b, inputs, outputs, "relu", True, False, True)[0]], [y])
    assert saved.shape == ((alone.numel() + 7) // 8,)
    assert torch.equal(unpacked(saved, alone.numel()), (alone > 0).flatten())
    assert not unpacked(saved, 8 * saved.numel())[alone.numel() :].any()


@each_dtype(F32, BF16)
@pytest.mark.parametrize("act", ["none", "gelu", "silu"])
@pytest.mark.parametrize("bias", [True, False])
def test_layer_with_other_activations(bias, act, dtype):
    x, w, b, inputs, outputs = layer(7, 45, 27, 19, 13, dtype, lead=(2, 3))
    b = b if bias else None
    z, full = dense(x, w, b, inputs, outputs, act)
    y, saved = masked.masked_linear_forward(x, w, b, inputs, outputs, act, False, False, True)
    close(y, full, PRODUCT[dtype])
    assert y.shape == full.shape
    assert masked.masked_linear_forward(x, w, b, inputs, outputs, act, False, False, False)[1].shape == (0,)
    if act == "none":
        assert saved.shape == (0,)
    else:
        close(saved, z.reshape(42, 13), PRODUCT[dtype])


@each_dtype(F32, BF16)
def test_layer_on_nan_and_zero(dtype):
    """A NaN that is live shows, and its bit is set: torch lets its gradient through too. Zeros have no bit."""
    x = torch.tensor([[1.0, -1.0], [NAN, 1.0], [0.0, 0.0]]).to(DEVICE, dtype)
    w = torch.eye(2).repeat(4, 1).to(DEVICE, dtype)
    y, saved = masked.masked_linear_forward(x, w, None, None, None, "relu", False, False, True)
    assert torch.equal(unpacked(saved, 24), ~(y <= 0).flatten())
    assert torch.equal(y[0], torch.tensor([1.0, 0.0] * 4).to(DEVICE, dtype))
    assert y[1].isnan().all()
    assert torch.equal(bits(y[2]), bits(torch.zeros(8).to(DEVICE, dtype)))


def test_layer_of_other_strides():
    """Views of wider tensors, transposed weights, a batch that is no view."""
    x, w, b, inputs, outputs = layer(9, 45, 27, 19, 13, F32)
    expected = masked.masked_linear_forward(x, w, b, inputs, outputs, "relu", False, False, True)
    wide = torch.full((9, 60), NAN, device=DEVICE)
    wide[:, 5:50] = x
    for a, c in ((wide[:, 5:50], w), (x.t().contiguous().t(), w), (x, w.t().contiguous().t())):
        assert same_bits(masked.masked_linear_forward(a, c, b, inputs, outputs, "relu", False, False, True), expected)
    swapped = x.view(3, 3, 45).transpose(0, 1).contiguous().transpose(0, 1)
    y, saved = masked.masked_linear_forward(swapped, w, b, inputs, outputs, "relu", False, False, True)
    assert same_bits([y.reshape(9, 27), saved], expected)


def test_refusals_of_the_layer():
    x, w, b, inputs, outputs = layer(9, 45, 27, 19, 13, F32)
    for arguments, message in (
        ((x, w, b, inputs, outputs, "tanh", False), "act='tanh'"),
        ((x, w.double(), b, inputs, outputs, "relu", False), "torch.float32, torch.float64"),
        ((x.double(), w.double(), b.double(), inputs, outputs, "relu", False), "not torch.float64"),
        ((x, w, b, inputs.long(), outputs, "relu", False), "in_idx must be contiguous int32"),
        ((x, w, b, inputs, torch.zeros(28, dtype=torch.int32, device=DEVICE), "relu", False), "out_idx .* most 27"),
        ((x, w, b, inputs, outputs, "relu", True), "x has 45 columns, must have 19"),
        ((x, w, b[:5], inputs, outputs, "relu", False), "bias must be"),
    ):
        with pytest.raises(RuntimeError, match=f"^masked_linear: .*{message}"):
            masked.masked_linear_forward(*arguments, False, True)


@pytest.mark.parametrize("act", ["none", "relu", "gelu"])
@pytest.mark.parametrize("compact", [False, True])
def test_masked_linear_runs_on_triton_when_asked(monkeypatch, act, compact):
    """Forward by the fused kernel, backward from what it saved: as without it, and NaN in dead inputs stays there."""
    torch.manual_seed(0)
    live_in, live_out = (torch.randperm(n)[: n // 3].sort()[0].to(torch.int32).to(DEVICE) for n in (24, 33))
    x, w, b = torch.randn(9, 24), torch.randn(33, 24), torch.randn(33)
    x, w, b = (t.to(DEVICE).requires_grad_() for t in (x, w, b))
    with torch.no_grad():
        dead = torch.ones(24, dtype=torch.bool, device=DEVICE).index_fill(0, live_in.long(), False)
        x[:, dead] = torch.nan
    given = x.detach()[:, live_in.long()].clone().requires_grad_() if compact else x
    found = []
    for backend in ("triton", ""):
        monkeypatch.setenv("TORSION_BACKEND", backend)
        y = torsion.ops.masked_linear(given, w, b, live_in, live_out, act, x_compact=compact, y_compact=compact)
        found.append([y, *torch.autograd.grad(y.square().sum(), (given, w, b))])
    for a, c in zip(*found, strict=True):
        close(a, c, Row(0.0, scale=1e-5, why="float32 sums of at most 33 products, in another order"))
