"""What surrounds the products of masked layers: the order of live units, packing, shortcuts, compiled parts."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import each_dtype, same_bits
from masked import SUMS, i32, index, leaves
from tolerances import close

import torsion
from torsion.ops import _backends, _blocks, _entry, _native
from torsion.ops._activations import ACTIVATIONS

linear, conv = torsion.ops.masked_linear, torsion.ops.masked_conv2d
needs_c = pytest.mark.skipif(_native.C is None, reason=_native.missing.get("_C", ""))
each_act = pytest.mark.parametrize("act", ACTIVATIONS)


def test_live_prefix():
    live = torch.tensor([0, 1, 0, 1, 1, 0], dtype=torch.uint8)
    order = torsion.ops.LivePrefix(live)
    assert order.order.tolist() == [1, 3, 4, 0, 2, 5]
    assert order.inverse.tolist() == [3, 0, 4, 1, 2, 5]
    assert order.count == 3
    assert order.index.tolist() == [0, 1, 2]
    assert order.index.dtype == torch.int32
    t = torch.randn(6, 4)
    assert torch.equal(order.restore(order.sort(t)), t)
    assert torch.equal(order.sort(t.t(), 1), order.sort(t).t())
    with pytest.raises(TypeError, match=r"live is torch\.float32"):
        torsion.ops.LivePrefix(live.float())
    with pytest.raises(ValueError, match="one dim"):
        torsion.ops.LivePrefix(live.view(2, 3))


def test_a_sorted_network_is_the_masked_one():
    """Two layers with scattered lists against the same two sorted once, compact in between."""
    hidden = torch.rand(40) < 0.5
    order, o = torsion.ops.LivePrefix(hidden), hidden.nonzero().flatten().int()
    x, w1, b1, w2 = torch.randn(9, 20), torch.randn(40, 20), torch.randn(40), torch.randn(10, 40)
    expected = linear(linear(x, w1, b1, None, o, "relu"), w2, None, o)
    h = linear(x, order.sort(w1), order.sort(b1), None, order.index, "relu", y_compact=True)
    found = linear(h, order.sort(w2, 1), None, order.index, x_compact=True)
    close(found, expected, SUMS[torch.float32])


@each_dtype()
@pytest.mark.parametrize("kernel", [(), (3, 2)], ids=["linear", "conv"])
@pytest.mark.parametrize("align", [1, 8, 16])
def test_pack_and_unpack(dtype, kernel, align):
    i, o = index(21, 0.5), index(17, 0.5, 1)
    w = torch.randn(17, 21, *kernel).to(dtype)
    packed = torsion.ops.pack_weight(w, i, o, align)
    assert packed.shape[:2] == (-(-len(o) // align) * align, -(-len(i) // align) * align)
    assert same_bits(packed[: len(o), : len(i)].contiguous(), w[o.long()][:, i.long()].contiguous())
    assert not packed[len(o) :].any()
    assert not packed[:, len(i) :].any()
    packed[len(o) :] = torch.nan
    full = torch.full_like(w, torch.nan)
    version = full._version
    assert torsion.ops.unpack_grad_(full, packed, i, o) is full
    assert full._version > version
    expected = torch.zeros_like(w)
    expected[o.long().unsqueeze(1), i.long()] = w[o.long()][:, i.long()]
    assert same_bits(full, expected)
    assert same_bits(torch.ops.torsion.pack_weight(w), torsion.ops.pack_weight(w, align=16))
    with pytest.raises(ValueError, match="align=0"):
        torsion.ops.pack_weight(w, i, o, 0)
    with pytest.raises(ValueError, match="live block is"):
        torsion.ops.unpack_grad_(full, packed[: len(o) - 1], i, o)


@pytest.mark.parametrize("prefix", [False, True], ids=["scattered", "prefix"])
def test_residual_select_add(prefix):
    """Branches with differing live sets: the channels alive in both are added, and gradients go the same way back."""
    src, dst = (torch.arange(3, dtype=torch.int32),) * 2 if prefix else (i32(0, 2, 5), i32(1, 3, 4))
    x, out = torch.randn(2, 6, 4, 4, requires_grad=True), torch.randn(2, 5, 4, 4, requires_grad=True)
    y = torsion.ops.residual_select_add_(out * 1, x, src, dst)
    expected = out.detach().clone()
    expected[:, dst.long()] += x.detach()[:, src.long()]
    assert torch.equal(y.detach(), expected)
    g = torch.randn_like(y)
    y.backward(g)
    assert torch.equal(out.grad, g)
    dx = torch.zeros_like(x)
    dx[:, src.long()] = g[:, dst.long()]
    assert torch.equal(x.grad, dx)
    with pytest.raises(ValueError, match="src_idx lists 3 channels, dst_idx 1"):
        torsion.ops.residual_select_add_(y.detach(), x, src, dst[:1])
    with pytest.raises(RuntimeError, match=r"src_idx is torch\.int64"):
        torch.ops.torsion.residual_select_add_(y.detach(), x, src.long(), dst)


def test_packing_of_fake_tensors_and_in_a_compilers_trace():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        weight, i, o = torch.empty(80, 60), torch.empty(30, dtype=torch.int32), torch.empty(40, dtype=torch.int32)
        packed = torsion.ops.pack_weight(weight, i, o)
        assert packed.shape == (48, 32)
        assert torsion.ops.unpack_grad_(weight, packed, i, o).shape == (80, 60)
    weight, i, o = torch.randn(80, 60), index(60, 0.5), index(80, 0.5, 1)
    pack, unpack = torch.ops.torsion.pack_weight, torch.ops.torsion.unpack_grad_

    def there_and_back(weight):
        return unpack(torch.empty_like(weight), pack(weight, i, o), i, o) + 0

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(weight), there_and_back(weight))


def test_lists_that_are_views_and_lists_that_are_none():
    x, w = torch.randn(3, 6), torch.randn(8, 6)
    sparse = torch.tensor([0, 9, 2, 9, 3], dtype=torch.int32)[::2]
    for lists in ((sparse, None), (None, sparse), (sparse, sparse)):
        assert same_bits(
            linear(x, w, None, *lists), linear(x, w, None, *(None if i is None else i.contiguous() for i in lists))
        )
    for layer, a, k in ((linear, x, w), (conv, torch.randn(2, 6, 5, 5), torch.randn(8, 6, 3, 3))):
        with pytest.raises(TypeError, match="in_idx is a list, must be a tensor"):
            layer(a, k, None, [0, 1])
        for bad in (i32(1, 0), i32(0, 1, 2, 3, 4, 4)):
            with pytest.raises(ValueError, match="sort it and drop repetitions"):
                layer(a, k, None, torch.nn.Parameter(bad, requires_grad=False))


@needs_c
@each_dtype()
@pytest.mark.parametrize("inner", [None, 1, 5], ids=str)
def test_gather_and_scatter(dtype, inner):
    ops = torch.ops.torsion
    for rows, columns in itertools.product((1, 5, 40), (1, 8, 17, 100)):
        shape = (rows, columns) if inner is None else (rows, columns, inner)
        t = torch.randn(shape).to(dtype)
        lists = [None, index(columns, 0.5), torch.arange(columns, dtype=torch.int32), index(columns, 0.95, 3),
                 torch.randperm(columns).int(), index(columns, 0.0)]  # fmt: skip
        for r, c in itertools.product((None, index(rows, 0.6, 2)), lists):
            found = ops.gather_blocks(t, r, c)
            expected = t if r is None else t[r.long()]
            expected = expected if c is None else expected[:, c.long()]
            assert same_bits(found, expected.contiguous())
            back = torch.full(shape, torch.nan).to(dtype)
            ops.scatter_blocks_(back, found, r, c)
            whole = torch.zeros(shape).to(dtype)
            whole[(torch.arange(rows) if r is None else r.long()).unsqueeze(1),
                  torch.arange(columns) if c is None else c.long()] = expected  # fmt: skip
            assert same_bits(back, whole)
        padded = torch.cat([index(columns, 0.5), i32(-1, -1)])
        assert not ops.gather_blocks(t, None, padded)[:, -2:].any()


def plain(monkeypatch, part, *arguments):
    """What a part computes in a build without ``_C``."""
    with monkeypatch.context() as build:
        build.setattr(_native, "C", None)
        return part(*arguments)


@needs_c
@each_dtype()
@pytest.mark.parametrize("inner", [None, 1, 5], ids=str)
def test_silencing(monkeypatch, dtype, inner):
    """A copy, and in place, with zeros in what is dead; what is dead may hold NaN."""
    for rows, columns in itertools.product((1, 9, 40), (1, 17, 100)):
        shape = (rows, columns) if inner is None else (rows, columns, inner)
        for r, c in itertools.product((None, index(rows, 0.6, 2)), (None, index(columns, 0.5), index(columns, 0.0))):
            t = torch.randn(shape).to(dtype)
            axes = [_blocks.axis("test", "list", i, n, t.device) for i, n in ((r, rows), (c, columns))]
            live = torch.zeros(shape)
            live[(torch.arange(rows) if r is None else r.long()).unsqueeze(1),
                 torch.arange(columns) if c is None else c.long()] = 1  # fmt: skip
            t[live == 0] = torch.nan
            expected = torch.where(live == 1, t, torch.zeros_like(t))
            for found in (_blocks.silenced(t, *axes), plain(monkeypatch, _blocks.silenced, t, *axes)):
                assert same_bits(found, expected)
            assert same_bits(_blocks.silence_(t, *axes), expected)
            assert same_bits(t, expected)


@needs_c
def test_silencing_refuses_lists_that_lie():
    t = torch.randn(4, 4)
    before = t.clone()
    for bad in (i32(1, 1), i32(2, 1), i32(-1, 2), i32(0, 4)):
        for lists in ((None, bad), (bad, None)):
            for op in (torch.ops.torsion.silenced_blocks, torch.ops.torsion.silence_blocks_):
                with pytest.raises(RuntimeError, match="silence"):
                    op(t, *lists)
    assert same_bits(t, before)


@needs_c
def test_silencing_by_several_threads():
    """Pieces of work, and rows that lie apart."""
    t = torch.randn(900, 260)[:, :250]
    r, c = index(900, 0.9), index(250, 0.9, 1)
    expected = torch.zeros_like(t)
    expected[r.long().unsqueeze(1), c.long()] = t[r.long().unsqueeze(1), c.long()]
    for threads in (1, 2):
        with limited(threads):
            assert same_bits(torch.ops.torsion.silenced_blocks(t, r, c), expected)
    torch.ops.torsion.silence_blocks_(t, r, c)
    assert same_bits(t, expected)


@contextlib.contextmanager
def limited(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@needs_c
@each_dtype()
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 6])
def test_what_met_a_number_that_is_not_finite(monkeypatch, dtype, form, groups):
    """The first channel of each group is looked at, whatever the layout, and no other."""
    step = 6 // groups
    for bad, c, last in itertools.product((torch.nan, torch.inf, -torch.inf), range(6), (0, -1)):
        t = torch.randn(5, 6, 7, 3).to(dtype).contiguous(memory_format=form)
        assert _blocks.met_finite(t, groups)
        t[last, c, last, last] = bad
        assert _blocks.met_finite(t, groups) == (c % step != 0)
        assert plain(monkeypatch, _blocks.met_finite, t, groups) == (c % step != 0)
        for part in (t[:, :, ::2], t[::2], t[last:][:1].expand(3, -1, -1, -1)):
            assert _blocks.met_finite(part, groups) == (c % step != 0)


@needs_c
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_large_product_is_looked_at_by_several_threads(form):
    t = torch.randn(8, 64, 30, 31).contiguous(memory_format=form)
    for groups in (1, 8, 64):
        assert _blocks.met_finite(t, groups)
        t[-1, 64 - 64 // groups, -1, -1] = torch.nan
        assert not _blocks.met_finite(t, groups)
        t[-1] = 0


@needs_c
@each_dtype()
def test_relu_bits(dtype):
    for n in (0, 1, 7, 8, 9, 63, 64, 65, 1000):
        z = torch.randn(n).to(dtype)
        z[::5] = 0
        z[1::7] = torch.nan
        y = z.clone()
        bits = torch.ops.torsion.relu_bits_(y)
        assert same_bits(y.nan_to_num(7.0), F.relu(z).nan_to_num(7.0) + 0)
        assert bits.shape == ((n + 7) // 8,)
        found = [(int(bits[i // 8]) >> (i % 8)) & 1 for i in range(n)]
        assert found == [int(not v <= 0) for v in z.tolist()]
        dz = torch.randn(n).to(dtype)
        kept = dz.clone()
        torch.ops.torsion.keep_bits_(kept, bits)
        assert same_bits(kept, torch.where(torch.tensor(found, dtype=torch.bool), dz, torch.zeros_like(dz)))


def test_without_compiled_code_the_parts_are_the_same(monkeypatch):
    """A build without ``_C``, and other devices, take plain torch for what surrounds the products."""
    i, o = index(20, 0.5), index(16, 0.5, 1)
    x, w, b = torch.randn(9, 20), torch.randn(16, 20), torch.randn(16)
    xc, wc = torch.randn(2, 20, 5, 5), torch.randn(16, 5, 3, 3)

    def run():
        found = []
        for op, a, k, options in ((linear, x, w, {}), (conv, xc, wc, dict(groups=4, padding=1))):
            tensors = leaves(a, k, b)
            y = op(*tensors, i, o, act="relu", **options)
            y.square().sum().backward()
            found += [y.detach(), *(t.grad for t in tensors)]
        return found

    compiled = run()
    monkeypatch.setattr(_native, "C", None)
    for a, e in zip(run(), compiled, strict=True):
        close(a, e, SUMS[torch.float32])
    with pytest.raises(ValueError, match=r"in_idx\[1\]=0 follows 1"):
        linear(x, w, None, i32(1, 0))


@needs_c
def test_both_ways_are_chosen():
    """Few dead: zeros in a dense product, bits of all outputs. Else gathers, bits of the live ones."""
    for m, share, whole in ((64, 0.99, True), (1024, 0.99, True), (1024, 0.5, False), (8, 0.05, False)):
        x, w = torch.randn(m, 512), torch.randn(512, 512)
        i, o = index(512, share), index(512, share, 1)
        _, bits = torch.ops.torsion.masked_linear_forward(x, w, None, i, o, "relu", False, False, True)
        assert bits.numel() == (m * (512 if whole else len(o)) + 7) // 8, (m, share)


def test_a_list_at_the_address_of_a_former_one_is_looked_into():
    """As lists on a device are remembered; an allocator gives an address away again at once."""
    memory = np.empty(4, dtype=np.int32)
    for entries, kind in ((0, 1, 2, 3), _blocks.PREFIX), ((1, 2, 3, 4), _blocks.SCATTERED), ((1, 2, 2, 4), 2):
        memory[:] = entries
        index = torch.from_numpy(memory)
        assert _blocks._remembered(index, 9) == _blocks._remembered(index, 9) == kind
        del index


def test_a_list_changed_in_place_is_looked_into_again():
    changed = i32(0, 1, 2)
    assert _blocks._remembered(changed, 9) == _blocks.PREFIX
    changed[2] = 1
    assert _blocks._remembered(changed, 9) == 2


def test_the_environment_chooses_the_reference(monkeypatch):
    """And the reference raises what the ops raise."""
    i, x, w = index(20, 0.5), torch.randn(9, 20), torch.randn(16, 20)
    ran = []
    monkeypatch.setattr(_entry, "needs_grad", lambda *_: ran.append("compiled") or False)
    linear(x, w, None, i)
    monkeypatch.setenv("TORSION_BACKEND", "reference")
    y = linear(x, w, None, i, act="relu")
    assert ran == ["compiled"]
    assert same_bits(y, torsion.reference.masked_linear(x, w, None, i, act="relu"))
    with pytest.raises(ValueError, match=r"in_idx\[1\]=0 follows 1"):
        linear(x, w, None, i32(1, 0))


def test_backends_tell_the_policy():
    for op in ("masked_linear", "masked_conv2d"):
        assert _backends.choose("cuda", kernels=_backends.KERNELS[op])[0] == "torch"
    found = torsion.backends()
    assert "views where live units come first" in found["masked_linear"]["why"]
    assert found["masked_conv2d"]["chosen"] in found["masked_conv2d"]["available"]
