"""DemP's noise: golden figures, masks, cut tensors, rounding at random, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from demp import CASES, each_backend, guarded, in_child, untouched
from helpers import bits, each_dtype, same_bits
from test_no_sync import no_sync
from tolerances import NORMALS, Row, close

import torsion
from torsion.ops import _native

needs_c = pytest.mark.skipif(_native.C is None, reason=_native.missing.get("_C", ""))
KEY = dict(seed=1234, step=7)
STORED = {
    torch.float64: Row(1e-15, atol=1e-15, why="one rounding"),
    torch.float32: Row(2.0**-23, atol=2e-7, why="one rounding, of noise known to 2^-21"),
    torch.bfloat16: Row(2.0**-7, atol=2e-7, why="to either neighbour of 8 bits"),
    torch.float16: Row(2.0**-10, atol=2e-7, why="to either neighbour of 11 bits"),
}


def update(p, sigma=0.05, row_live=None, col_live=None, rows=None, cols=None, orig_cols=None, tensor_id=3, **options):
    columns = p.numel() // p.shape[0] if p.dim() and p.shape[0] else p.numel()
    torsion.ops.demp_update_(
        [p], [row_live], [col_live], [rows], [cols], [columns if orig_cols is None else orig_cols], sigma,
        **{**KEY, **options}, tensor_ids=[tensor_id],
    )  # fmt: skip
    return p


def flags(n, share=0.5, seed=0):
    return (torch.rand(n, generator=torch.Generator().manual_seed(seed)) < share).to(torch.uint8)


def some(n, k, seed=1):
    """k of n, ascending."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:k].sort()[0]


# Golden


@each_backend
def test_noise_in_original_coordinates(backend):
    """N3: a tensor of zeros with sigma 1 holds the noise itself, before and after a cut."""
    inputs, expected = CASES["N3"]["inputs"], CASES["N3"]["expected"]
    golden = Row(1e-13, why="the golden figure")
    full = update(torch.zeros(3, 4, dtype=torch.float64), 1.0, backend=backend)
    close(full, torch.tensor(expected["full"], dtype=torch.float64), golden)
    rows, cols = (torch.tensor(inputs[name]) for name in ("rows", "cols"))
    cut = update(torch.zeros(2, 3, dtype=torch.float64), 1.0, rows=rows, cols=cols, orig_cols=4, backend=backend)
    close(cut, torch.tensor(expected["compact"], dtype=torch.float64), golden)


# Against the reference: every way through the kernel

SHAPES = [(50, 1001), (7, 64), (130, 63), (40, 9), (300, 1), (1, 3), (12, 3, 5, 5), (5,), ()]


@needs_c
@each_dtype()
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masks", ["all", "rows", "columns", "both", "none-live"])
def test_masks_against_the_reference(dtype, shape, masks):
    p, whole = guarded(torch.randn(shape).to(dtype))
    start = p.clone()
    n_rows = shape[0] if shape else 1
    n_cols = p.numel() // n_rows
    row_live = flags(n_rows) if masks in ("rows", "both") else torch.zeros(n_rows, dtype=torch.uint8)
    row_live = None if masks in ("all", "columns") else row_live
    col_live = flags(n_cols, seed=2) if masks in ("columns", "both") else None
    expected = start.clone()
    args = ([row_live], [col_live], [None], [None], [n_cols], 0.05, 1234, 7, [3])
    torsion.reference.demp_update_([expected], *args)
    torsion.ops.demp_update_([p], *args, backend="cpu")
    close(p, expected, STORED[dtype])
    live = torch.ones(n_rows, n_cols, dtype=torch.bool)
    live &= True if row_live is None else row_live.bool().unsqueeze(1)
    live &= True if col_live is None else col_live.bool()
    moved = (bits(p) != bits(start)).reshape(n_rows, n_cols, -1).any(-1) if p.dim() else None
    if moved is not None:
        assert not moved[~live].any(), "a dead entry moved"
        if dtype in (torch.float32, torch.float64):
            assert moved[live].float().mean() > 0.99 if live.any() else True
    assert untouched(whole)


@needs_c
@pytest.mark.parametrize("columns", [64, 67, 3], ids=str)
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
def test_elements_whose_blocks_need_more_than_32_bits(columns, cut):
    """Rows on both sides of element 2^34 of an uncut tensor, the first of block 2^32."""
    rows = torch.arange(2**34 // columns - 20, 2**34 // columns + 20)
    cols = some(columns, columns - 1) if cut else None
    for dtype in (torch.float32, torch.float64):
        found, expected = (torch.zeros(40, columns - cut, dtype=dtype) for _ in range(2))
        args = ([None], [None], [rows], [cols], [columns], 1.0, 1234, 7, [3])
        torsion.ops.demp_update_([found], *args, backend="cpu")
        torsion.reference.demp_update_([expected], *args)
        close(found, expected, NORMALS[dtype])


@needs_c
@each_dtype()
@pytest.mark.parametrize(
    ("orig", "kept"),
    [
        ((90, 1001), (50, 700)),
        ((90, 1001), (50, 5)),
        ((90, 9), (37, 9)),
        ((400, 1), (150, 1)),
        ((20, 2000), (20, 1999)),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["ascending", "any"])
def test_update_of_a_cut_is_the_cut_of_an_update(dtype, orig, kept, order):
    """Bit for bit, in every dtype: the rounding bits belong to original elements too."""
    full = torch.randn(orig).to(dtype)
    rows, cols = some(orig[0], kept[0]), some(orig[1], kept[1], 2)
    if order == "any":
        rows, cols = rows[torch.randperm(len(rows))], cols[torch.randperm(len(cols))]
    row_live, col_live = flags(orig[0], 0.7), flags(orig[1], 0.7, 4)
    cut = full[rows][:, cols].contiguous()
    update(full, row_live=row_live, col_live=col_live, backend="cpu")
    update(
        cut, row_live=row_live[rows], col_live=col_live[cols], rows=rows, cols=cols, orig_cols=orig[1], backend="cpu"
    )
    assert same_bits(cut, full[rows][:, cols].contiguous())


@each_backend
@each_dtype(torch.float32, torch.bfloat16)
def test_grouped_convolution(dtype, backend):
    """Two groups of output channels that keep different input channels of four: columns differ by group."""
    full = torch.randn(6, 4, 3, 3).to(dtype)
    kept = torch.tensor([[0, 2], [1, 3]])
    rows = torch.tensor([0, 2, 4, 5])
    cols = (kept.unsqueeze(2) * 9 + torch.arange(9)).reshape(2, 18)
    cut = torch.stack([full[r][kept[g]] for r, g in zip(rows, (0, 0, 1, 1), strict=True)]).contiguous()
    update(full, backend=backend)
    update(cut, rows=rows, cols=cols, orig_cols=36, backend=backend)
    assert same_bits(cut, torch.stack([full[r][kept[g]] for r, g in zip(rows, (0, 0, 1, 1), strict=True)]))


@each_backend
def test_the_noise_is_philox_normal(backend):
    p = update(torch.zeros(30, 70), 0.5, tensor_id=9, backend=backend)
    assert same_bits(p, 0.5 * torsion.ops.philox_normal((30, 70), 1234, 7, 9, backend=backend))


def test_transposed_rows_are_columns():
    """A transposed convolution has its units along dim 1: a mask of the flattened columns."""
    p, unit = torch.zeros(4, 6, 2, 2), flags(6)
    update(p, col_live=unit.repeat_interleave(4).contiguous())
    assert ((p != 0).flatten(2).any(2) == unit.bool()).all()


@each_backend
def test_several_parameters_at_once_are_each_alone(backend):
    shapes = [(30, 70), (5,), (4, 3, 3, 3), (0, 3), (100, 1)]
    starts = [torch.randn(s) for s in shapes]
    together = [t.clone() for t in starts]
    live = [flags(s[0], seed=i) for i, s in enumerate(shapes)]
    none = [None] * len(shapes)
    columns = [70, 1, 27, 3, 1]
    torsion.ops.demp_update_(
        together, live, none, none, none, columns, 0.1, 5, 6, list(range(len(shapes))), backend=backend
    )
    for i, start in enumerate(starts):
        alone = start.clone()
        torsion.ops.demp_update_(
            [alone], [live[i]], [None], [None], [None], [columns[i]], 0.1, 5, 6, [i], backend=backend
        )
        assert same_bits(alone, together[i])


@each_backend
@each_dtype(torch.bfloat16, torch.float16)
def test_rounding_has_no_bias(dtype, backend):
    """A kick of 5e-5 is far below half a place of 1: rounded to nearest all of them would be lost (edge case 15)."""
    p = torch.ones(400, 500, dtype=dtype)
    xi = torsion.ops.philox_normal((400, 500), 1234, 7, 3).double()
    update(p, 5e-5, backend=backend)
    moved = p.double() - 1
    # Each entry moves by a whole place with odds equal to the kick: the mean of xi times the move is sigma.
    slope = float((moved * xi).mean() / (xi * xi).mean())
    assert 0.8 < slope / 5e-5 < 1.2
    assert abs(float(moved.mean())) < 6 * float(moved.std()) / 400 / 500**0.5 + 5e-5 * abs(float(xi.mean()))
    assert (moved != 0).any()
    assert not bool((torch.ones(3, dtype=dtype) + torch.tensor(5e-5, dtype=dtype) != 1).any())


def test_rounding_bits_are_not_those_of_the_noise():
    """Blocks of their own: entries that are rounded up have no more noise than others of the same residue."""
    p = torch.full((1000, 1000), 1.0, dtype=torch.bfloat16)
    update(p, 1e-3)
    xi = torsion.ops.philox_normal((1000, 1000), 1234, 7, 3)
    narrow = (xi > 1.0) & (xi < 1.01)
    odds = (p[narrow] > 1).double().mean()
    assert abs(float(odds) - 1.005e-3 * 128) < 5 * (0.13 / int(narrow.sum())) ** 0.5


def test_sigma_zero_writes_nothing():
    p = torch.randn(5, 7).bfloat16()
    before = bits(p)
    update(p, 0.0)
    assert torch.equal(bits(p), before)


# Sigma and step as tensors: what only a device knows


@each_backend
@each_dtype()
@pytest.mark.parametrize("which", ["sigma", "step", "both"])
def test_numbers_in_tensors(which, dtype, backend):
    """The same bits as plain numbers, whatever types the tensors have."""
    start = torch.randn(40, 67).to(dtype)
    for sigma, step in ((0.25, 7), (1e-3, 2**32 - 1), (0.1, 0)):
        plain, known = start.clone(), start.clone()
        mask = flags(40)
        update(plain, sigma, row_live=mask, step=step, backend=backend)
        for wide in (True, False):
            if not wide and (sigma != 0.25 or step != 7):
                continue  # neither float32 nor int32 holds them
            given = {"sigma": sigma, "step": step}
            if which != "step":
                given["sigma"] = torch.tensor(sigma, dtype=torch.float64 if wide else torch.float32)
            if which != "sigma":
                given["step"] = torch.tensor(step, dtype=torch.int64 if wide else torch.int32)
            known.copy_(start)
            update(known, row_live=mask, backend=backend, **given)
            assert same_bits(known, plain)


@each_backend
def test_numbers_in_tensors_are_not_read(backend):
    p, sigma, step = torch.ones(6, 5), torch.tensor(0.5), torch.tensor(3)
    with no_sync():
        update(p, sigma, step=step, row_live=flags(6), backend=backend)
    expected = update(torch.ones(6, 5), 0.5, step=3, row_live=flags(6), backend=backend)
    assert same_bits(p, expected)
    assert (float(sigma), int(step)) == (0.5, 3)


@each_backend
@each_dtype()
def test_a_sigma_of_zero_in_a_tensor_writes_nothing(dtype, backend):
    """Not even the sign of a zero."""
    p = torch.tensor([[-0.0, 0.0, 1.0, torch.inf]]).to(dtype)
    before = bits(p)
    update(p, torch.zeros(()), backend=backend)
    assert torch.equal(bits(p), before)


BAD_TENSORS = {
    "sigma-size": (dict(sigma=torch.ones(2)), ValueError, r"sigma must be one number, has shape \(2,\)"),
    "step-size": (dict(step=torch.zeros(0, dtype=torch.int64)), ValueError, r"step must be one number"),
    "step-dtype": (dict(step=torch.tensor(1.0)), TypeError, "step is torch.float32, must be an integer"),
    "step-bool": (dict(step=torch.tensor(True)), TypeError, "step is torch.bool"),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_of_numbers(name):
    change, error, message = BAD_TENSORS[name]
    p = torch.zeros(3, 4)
    with pytest.raises(error, match=message):
        update(p, **change)
    assert not p.any()


@needs_c
@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        (torch.tensor([-1.0, 2.0], dtype=torch.float64), "sigma must be finite"),
        (torch.tensor([torch.nan, 2.0], dtype=torch.float64), "sigma must be finite"),
        (torch.tensor([1.0, 2.0**32], dtype=torch.float64), "step must lie"),
        (torch.tensor([1.0, -1.0], dtype=torch.float64), "step must lie"),
        (torch.tensor([1.0, torch.nan], dtype=torch.float64), "step must lie"),
        (torch.tensor([1.0, 2.0]), "numbers has the wrong dtype"),
        (torch.tensor([1.0], dtype=torch.float64), "numbers must be contiguous with at least 2"),
    ],
    ids=str,
)
def test_the_op_refuses_bad_numbers(numbers, message):
    p = torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match=f"demp_update_: {message}"):
        torch.ops.torsion.demp_update_([p], [None], [None], [None], [None], [4], 0.1, 1, 2, [0], numbers)
    assert not p.any()


def test_nonfinite_parameters_stay_so():
    p = torch.tensor([[torch.inf, -torch.inf, torch.nan, 1.0]])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = update(p.to(dtype).clone())
        assert torch.equal(found.isnan(), p.isnan())
        assert torch.equal(found.isinf(), p.isinf())


BITS = (
    "import torch, torsion, demp\n"
    "torch.set_num_threads({threads})\n"
    "g = torch.Generator().manual_seed(0)\n"
    "tensors = [torch.randn(s, generator=g).to(d) for s in ((150, 900), (150, 9), (700,)) "
    "for d in (torch.float32, torch.float64, torch.bfloat16, torch.float16)]\n"
    "live = [(torch.rand(len(t), generator=g) < .5).to(torch.uint8) for t in tensors]\n"
    "columns = [torch.arange(1000)[:t.numel() // len(t)] * 2 for t in tensors]\n"
    "none = [None] * len(tensors)\n"
    "ids = list(range(len(tensors)))\n"
    "torsion.ops.demp_update_(tensors, live, none, none, columns, [2000] * len(ids), .1, 5, 6, ids)\n"
    "torsion.ops.demp_update_(tensors, live, none, none, none, [len(c) for c in columns], .1, 5, 7, ids)\n"
    "print(demp.digest(*tensors))"
)


@needs_c
@pytest.mark.parametrize("level", ["0", "1", "2"], ids=["baseline", "x86-64-v3", "x86-64-v4"])
def test_instruction_sets_and_threads_are_equal(level):
    here = {}
    exec(BITS.format(threads=1).replace("print(", "here['it'] = ("), {"here": here})
    assert in_child(BITS.format(threads=3), TORSION_ISA=level) == here["it"]


def test_noise_of_an_adamw_step():
    """U1: lasso in the gradient, the moments and the step, then noise on live rows. Here the noise of that case."""
    case = CASES["U1"]
    inputs, expected = case["inputs"], case["expected"]
    for name in ("gamma", "weight"):
        start, given = torch.tensor(inputs[name]["p"], dtype=torch.float64), inputs[name]
        g = torch.tensor(given["grad_ce"], dtype=torch.float64)
        if name == "gamma":
            g = g + expected["lam"] * start.sign()
            close(g, torch.tensor(expected["gamma"]["grad"], dtype=torch.float64), Row(1e-13, why="golden"))
        p = torch.nn.Parameter(start.clone())
        optimizer = torch.optim.AdamW(
            [p], lr=inputs["lr"], betas=tuple(inputs["betas"]), eps=inputs["eps"], weight_decay=inputs["weight_decay"]
        )
        optimizer.state[p] = dict(
            step=torch.tensor(float(inputs["completed_steps"])),
            exp_avg=torch.tensor(given["exp_avg"], dtype=torch.float64),
            exp_avg_sq=torch.tensor(given["exp_avg_sq"], dtype=torch.float64),
        )
        p.grad = g
        optimizer.step()
        close(p - start, torch.tensor(expected[name]["update"], dtype=torch.float64), Row(1e-10, why="p rounds it"))
        live = torch.tensor(inputs["row_live"], dtype=torch.float64).reshape(-1, *[1] * (p.dim() - 1))
        noise = expected["sigma"] * live * torch.tensor(given["xi"], dtype=torch.float64)
        close(p + noise, torch.tensor(expected[name]["row"], dtype=torch.float64), Row(1e-13, why="golden"))
        # The op's mask is the case's: it adds sigma xi on those rows and nothing elsewhere.
        noised = p.detach().clone().reshape(4, -1).contiguous()
        before = noised.clone()
        update(noised, expected["sigma"], row_live=torch.tensor(inputs["row_live"], dtype=torch.uint8))
        drawn = torsion.ops.philox_normal(tuple(noised.shape), 1234, 7, 3, dtype=torch.float64)
        assert same_bits(noised, torch.where(live.reshape(4, 1) != 0, before + expected["sigma"] * drawn, before))


# The op


@each_dtype(torch.float32, torch.bfloat16)
def test_opcheck(dtype):
    arguments = (
        [torch.rand(4, 6).to(dtype), torch.rand(3).to(dtype)], [flags(4), None], [None, None], [None, torch.arange(3)],
        [torch.arange(6), None], [8, 1], 0.1, 1, 2, [0, 1],
    )  # fmt: skip
    numbers = torch.tensor([0.1, 2.0], dtype=torch.float64)
    for given in (arguments, (*arguments, numbers)):
        assert set(torch.library.opcheck(torch.ops.torsion.demp_update_.default, given).values()) == {"SUCCESS"}


@each_backend
def test_version_counters_and_leaves(backend):
    p = torch.nn.Parameter(torch.ones(3, 4))
    version = p._version
    update(p, backend=backend)
    assert p._version > version
    assert p.is_leaf
    assert p.grad_fn is None


BAD = {
    "lists": (dict(orig_cols=[4, 4]), ValueError, "1 params, but orig_cols has 2 entries"),
    "sigma": (dict(sigma=-1.0), ValueError, "sigma=-1.0 must be finite"),
    "nan": (dict(sigma=float("nan")), ValueError, "sigma=nan"),
    "seed": (dict(seed=2**64), ValueError, "seed="),
    "step": (dict(step=2**32), ValueError, "step=4294967296"),
    "tensor": (dict(tensor_ids=[-1]), ValueError, "tensor_id=-1"),
    "dtype": (dict(params=[torch.zeros(3, 4, dtype=torch.int32)]), TypeError, r"params\[0\] is torch.int32"),
    "layout": (dict(params=[torch.zeros(4, 3).t()]), ValueError, r"params\[0\] is not contiguous"),
    "live-size": (dict(row_live=[torch.ones(4, dtype=torch.uint8)]), ValueError, r"row_live\[0\].*3 entries.*has 4"),
    "live-dtype": (dict(row_live=[torch.ones(3)]), TypeError, r"row_live\[0\] is torch.float32, must be torch.uint8"),
    "rows-dtype": (dict(rows=[torch.arange(3, dtype=torch.int32)]), TypeError, r"rows\[0\] is torch.int32"),
    "rows-negative": (dict(rows=[torch.tensor([0, -1, 2])]), ValueError, r"rows\[0\] holds numbers outside"),
    "cols-range": (dict(cols=[torch.tensor([0, 1, 2, 4])]), ValueError, r"cols\[0\] holds numbers outside \[0, 4\)"),
    "cols-groups": (dict(cols=[torch.zeros(2, 4, dtype=torch.int64)]), ValueError, "2 lines, which do not divide 3"),
    "narrow": (dict(orig_cols=[3]), ValueError, r"orig_cols\[0\]=3 is less than the 4 columns"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_change_nothing(name):
    change, error, message = BAD[name]
    good = dict(
        params=[torch.zeros(3, 4)], row_live=[None], col_live=[None], rows=[None], cols=[None], orig_cols=[4],
        sigma=0.1, seed=1, step=2, tensor_ids=[0],
    )  # fmt: skip
    arguments = {**good, **change}
    before = [bits(p) for p in arguments["params"]]
    with pytest.raises(error, match=message):
        torsion.ops.demp_update_(**arguments)
    assert all(torch.equal(a, bits(p)) for a, p in zip(before, arguments["params"], strict=True))


@needs_c
@pytest.mark.parametrize("name", [n for n in BAD if n not in ("sigma", "nan", "seed", "layout")])
def test_the_op_refuses_by_runtime_error(name):
    change = BAD[name][0]
    second = torch.zeros(3, 4)
    good = dict(
        params=[torch.zeros(3, 4)], row_live=[None], col_live=[None], rows=[None], cols=[None], orig_cols=[4],
        sigma=0.1, seed=1, step=2, tensor_ids=[0],
    )  # fmt: skip
    arguments = {**good, **change}
    # The good parameter comes first: nothing may have been written when the bad one is found.
    arguments = {k: [*([second] if k == "params" else good[k]), *v] if isinstance(v, list) else v
                 for k, v in arguments.items()}  # fmt: skip
    with pytest.raises(RuntimeError, match="demp_update_"):
        torch.ops.torsion.demp_update_(*arguments.values())
    assert not second.any()


def test_an_empty_list_is_nothing():
    torsion.ops.demp_update_([], [], [], [], [], [], 0.1, 1, 2, [])


@each_backend
def test_rows_and_masks_in_every_combination(backend):
    """rows, cols, row_live and col_live, given or not, say what an explicit sum over the entries says."""
    noise = torsion.ops.philox_normal((20, 90), 1234, 7, 3, dtype=torch.float64, backend=backend)
    for use_rows, use_cols, use_row_live, use_col_live in itertools.product([False, True], repeat=4):
        rows = some(20, 12) if use_rows else None
        cols = some(90, 70) if use_cols else None
        n_rows, n_cols = (12 if use_rows else 20), (70 if use_cols else 90)
        row_live = flags(n_rows) if use_row_live else None
        col_live = flags(n_cols, seed=5) if use_col_live else None
        expected = noise[rows] if use_rows else noise
        expected = (expected[:, cols] if use_cols else expected).clone()
        if use_row_live:
            expected[row_live == 0] = 0
        if use_col_live:
            expected[:, col_live == 0] = 0
        p = torch.zeros(n_rows, n_cols, dtype=torch.float64)
        update(p, 1.0, row_live, col_live, rows, cols, 90, backend=backend)
        assert same_bits(p, expected + 0)
