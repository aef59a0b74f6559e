"""DemP's ops in Triton: against the references, a judge in float64 and the compiled CPU ops, bit by bit where they are.

In the interpreter where there is no GPU, so tensors are small and hold odd sizes, masks, empty lists and planted NaN.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from demp import CASES, guarded, untouched
from helpers import bits, each_dtype, lay, same_bits
from test_active_flags import activation, judge
from test_demp_ops import STORED, flags, some
from test_triton_masked import layer
from tolerances import NORMALS, Row, close
from torch import Tensor

import torsion
from torsion.ops import _backends, _native
from torsion.ops.flags import CRITERIA

if not importlib.util.find_spec("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)
import triton
import triton.language as tl

from torsion.triton_kernels import demp, engine, masked, normals
from torsion.triton_kernels import flags as detector

pytestmark = [
    pytest.mark.triton,
    pytest.mark.backend("triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
DEVICE = "cpu" if engine.INTERPRETED else "cuda"
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAN = float("nan")
each_criterion = pytest.mark.parametrize("criterion", CRITERIA)


@pytest.fixture(autouse=True)
def _no_tables_left() -> None:
    demp._tables.clear()


@triton.jit
def _fuse_kernel(out, x):
    a = tl.load(x)
    tl.store(out, tl.fma(a, a, -1.0 + 0 * a))


@pytest.fixture(scope="module")
def same_as_compiled() -> bool:
    """Whether bits can be those of the compiled CPU ops: not every interpreter of Triton rounds an fma once."""
    if _native.C is None:
        return False
    x = torch.tensor([1 + 2.0**-12, 0.0], device=DEVICE)
    _fuse_kernel[(1,)](x[1:], x)
    return float(x[1]) == 2.0**-11 + 2.0**-24


# Normals


@each_dtype()
@pytest.mark.parametrize("n", [1, 6, normals.BLOCK + 7])
def test_normals(n, dtype, same_as_compiled):
    seed, step, tensor_id = 2**64 - 5, 2**32 - 3, 2**31 + 9
    out, whole = guarded(torch.zeros(n).to(dtype))
    out, whole = (out, whole) if DEVICE == "cpu" else (out.to(DEVICE), whole)
    normals.philox_normal_(out, seed - 2**64, step, tensor_id)
    close(
        out, torsion.reference.philox_normal((n,), seed, step, tensor_id, F64 if dtype == F64 else F32), NORMALS[dtype]
    )
    assert untouched(whole)
    if same_as_compiled:
        assert same_bits([out.cpu()], [torsion.ops.philox_normal((n,), seed, step, tensor_id, dtype, backend="cpu")])


def test_normals_of_no_element():
    assert torsion.ops.philox_normal((3, 0), 1, 2, 3, device=DEVICE, backend="triton").shape == (3, 0)


# Noise


def update(params, sigma=0.05, step=7, numbers=None, **lists):
    """demp_update_ on a list, whose lists are None where they are not given."""
    none = [None] * len(params)
    columns = [p.numel() // p.shape[0] if p.dim() and p.shape[0] else p.numel() for p in params]
    given = [lists.get(name, none) for name in ("row_live", "col_live", "rows", "cols")]
    ids = list(range(3, 3 + len(params)))
    demp.demp_update_(params, *given, lists.get("orig_cols", columns), sigma, 1234, step, ids, numbers)


def compiled_update(params, sigma=0.05, **lists):
    """The same by the compiled CPU op, on copies."""
    copies = [p.cpu().clone() for p in params]
    none = [None] * len(params)
    columns = [p.numel() // p.shape[0] if p.dim() and p.shape[0] else p.numel() for p in params]
    given = [
        [None if t is None else t.cpu() for t in lists.get(name, none)]
        for name in ("row_live", "col_live", "rows", "cols")
    ]
    ids = list(range(3, 3 + len(params)))
    arguments = (copies, *given, lists.get("orig_cols", columns), sigma, 1234, 7, ids)
    if _native.C is None:
        torsion.reference.demp_update_(*arguments)
    else:
        torsion.ops.demp_update_(*arguments, backend="cpu")
    return copies


SHAPES = [(5, 64), (3, 4, 3, 3), (70, 9), (9, 264), (300, 1), ()]


@pytest.mark.parametrize(
    ("masks", "dtype"),
    [("both", F32), ("both", F64), ("both", BF16), ("both", F16), ("none", BF16), ("rows", F16),
     ("nothing lives", F32)],
    ids=str,
)  # fmt: skip
def test_noise_of_a_list(masks, dtype, same_as_compiled):
    """Shapes of every kind of launch at once, in guarded memory."""
    tensors, wholes, row_live, col_live = [], [], [], []
    for i, shape in enumerate(SHAPES):
        t, whole = guarded(torch.randn(shape).to(dtype))
        tensors.append(t)
        wholes.append(whole)
        n_rows = shape[0] if shape else 1
        share = 0.0 if masks == "nothing lives" else 0.5
        row_live.append(None if masks == "none" else flags(n_rows, share, i).to(DEVICE))
        col_live.append(flags(t.numel() // n_rows, 0.7, i).to(DEVICE) if masks == "both" else None)
    ours = [t.to(DEVICE) for t in tensors]
    expected = compiled_update(tensors, row_live=row_live, col_live=col_live)
    before = [bits(t) for t in tensors]
    update(ours, row_live=row_live, col_live=col_live)
    for t, e in zip(ours, expected, strict=True):
        close(t, e, STORED[dtype])
    if same_as_compiled:
        assert same_bits([t.cpu() for t in ours], expected)
    if masks == "nothing lives":
        assert all(torch.equal(bits(t.cpu()), b) for t, b in zip(ours, before, strict=True))
    assert all(map(untouched, wholes))


def test_golden_noise_before_and_after_a_cut():
    inputs, expected = CASES["N3"]["inputs"], CASES["N3"]["expected"]
    full, cut = (torch.zeros(s, dtype=F64, device=DEVICE) for s in ((3, 4), (2, 3)))
    rows, cols = (torch.tensor(inputs[name], device=DEVICE) for name in ("rows", "cols"))
    none = [None]
    demp.demp_update_([full], none, none, none, none, [4], 1.0, 1234, 7, [3])
    demp.demp_update_([cut], none, none, [rows], [cols], [4], 1.0, 1234, 7, [3])
    for t, name in ((full, "full"), (cut, "compact")):
        close(t, torch.tensor(expected[name], dtype=F64), Row(1e-13, why="the golden figure"))


@each_dtype(F32, BF16)
@pytest.mark.parametrize("kept", [(9, 40), (12, 264), (7, 1)], ids=str)
def test_update_of_a_cut_is_the_cut_of_an_update(kept, dtype):
    """Bit for bit; with whole rows kept too, where neighbours share blocks on both sides."""
    full = torch.randn(12, 264).to(DEVICE, dtype)
    rows, cols = some(12, kept[0]).to(DEVICE), some(264, kept[1], 2).to(DEVICE)
    row_live = flags(12, 0.7).to(DEVICE)
    cut = full[rows][:, cols].contiguous()
    all_columns = kept[1] == 264
    update([full], row_live=[row_live])
    update([cut], row_live=[row_live[rows]], rows=[rows], cols=[None if all_columns else cols], orig_cols=[264])
    assert same_bits([cut], [full[rows][:, cols].contiguous()])


@each_dtype(F32, BF16)
def test_a_cut_vector_and_a_grouped_convolution(dtype):
    bias, full = torch.randn(40).to(DEVICE, dtype), torch.randn(6, 4, 3, 3).to(DEVICE, dtype)
    few = some(40, 17).to(DEVICE)
    kept, rows = torch.tensor([[0, 2], [1, 3]]), torch.tensor([0, 2, 4, 5], device=DEVICE)
    cols = (kept.unsqueeze(2) * 9 + torch.arange(9)).reshape(2, 18).to(DEVICE)
    groups = (0, 0, 1, 1)

    def cut_of(t: Tensor) -> Tensor:
        return torch.stack([t[r][kept[g].to(DEVICE)] for r, g in zip(rows.tolist(), groups, strict=True)]).contiguous()

    cuts = [bias[few], cut_of(full)]
    update([bias, full])
    update(cuts, rows=[few, rows], cols=[None, cols], orig_cols=[1, 36])
    assert same_bits(cuts, [bias[few], cut_of(full)])


def test_numbers_of_elements_have_64_bits():
    rows = torch.tensor([0, 5, 2**12 - 1], device=DEVICE)
    cols = torch.tensor([3, 2**33 + 6, 2**50 - 1], device=DEVICE)
    p = torch.zeros(3, 3, dtype=F64, device=DEVICE)
    lists: dict[str, Any] = dict(rows=[rows], cols=[cols], orig_cols=[2**50])
    update([p], 1.0, **lists)
    close(p, compiled_update([torch.zeros(3, 3, dtype=F64)], 1.0, **lists)[0], Row(1e-14, why="two evaluations"))


@each_dtype(F32, F16)
def test_numbers_on_the_device(dtype):
    """sigma and step may be known there alone."""
    start = torch.randn(6, 40).to(DEVICE, dtype)
    start[0, 0] = -0.0
    plain, told = start.clone(), start.clone()
    update([plain], 0.0625)
    update([told], 0.0, 0, torch.tensor([0.0625, 7], dtype=F64, device=DEVICE))
    assert same_bits([told], [plain])
    unmoved = start.clone()
    update([unmoved], 0.5, 0, torch.tensor([0, 7], dtype=F64, device=DEVICE))
    update([unmoved], 0.0)
    assert same_bits([unmoved], [start])


def test_rounding_has_no_bias():
    """Kicks of less than half a place would be lost when rounded to nearest."""
    p = torch.ones(16, 1024, dtype=BF16, device=DEVICE)
    place = torch.finfo(BF16).eps
    update([p], place / 10)
    moved = p.double() - 1
    xi = torsion.reference.philox_normal(p.shape, 1234, 7, 3, device=DEVICE).double()
    assert 0.8 < float((moved * xi).mean() / (xi * xi).mean()) / (place / 10) < 1.2


def test_a_table_serves_until_something_moves(monkeypatch):
    p, live = torch.zeros(8, 16, device=DEVICE), torch.ones(8, dtype=torch.uint8, device=DEVICE)
    for _ in range(2):
        update([p], row_live=[live])
    assert len(demp._tables) == 1
    q = p.clone()
    live[3] = 0
    update([q], row_live=[live])
    assert len(demp._tables) == 2
    assert same_bits([q[3]], [p[3]])
    assert not torch.equal(q[4], p[4])
    monkeypatch.setattr(demp, "_MOST_TABLES", 2)
    update([torch.zeros(5, device=DEVICE)])
    assert len(demp._tables) == 2


def test_strips_cover_tensors_beyond_two_to_the_31():
    """The table of tensors that are not there: every tile is in one strip, numbers are whole."""
    records = [
        demp._record(0, torch.empty(2**20, 2**14, device="meta", dtype=BF16), None, None, None, None, 2**14, 5),
        demp._record(1, torch.empty(2**33, device="meta"), None, None, None, None, 1, 6),
        demp._record(2, torch.empty(0, 4, device="meta"), None, None, None, None, 4, 7),
    ]
    kinds = [demp._kind(r, d) for r, d in zip(records, (BF16, F32, F32), strict=True)]
    assert [k.shared for k in kinds[:2]] == [True, True]
    assert records[1][demp.N_ROWS.value : demp.N_COLS.value + 1] == [1, 2**33]
    small = [[*r[: demp.N_ROWS.value], min(r[5], 2**10), min(r[6], 2**16), *r[7:]] for r in records]
    table = demp._build(small, kinds, torch.device("cpu"))
    for i, kind in enumerate(kinds[:2]):
        height, width = kind.tile
        n_rows, n_cols = small[i][5:7]
        strips = -(-n_rows // height) * -(-n_cols // (width * demp.TURNS.value))
        own = [n for r, n in table.launches[kind].tolist() if r == i]
        assert own == list(range(strips))
    assert sum(map(len, table.launches.values())) == sum(
        len([1 for r, _ in t.tolist() if r != 2]) for t in table.launches.values()
    )


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "list": (dict(orig_cols=[4, 4]), "lists differ in length"),
    "narrow": (dict(orig_cols=[3]), r"orig_cols\[0\] = 3 is less than the 4 columns"),
    "mask": (dict(row_live=[torch.ones(4, dtype=torch.uint8)]), r"row_live\[0\] must be contiguous torch.uint8 with 3"),
    "rows": (dict(rows=[torch.arange(3, dtype=torch.int32)]), r"rows\[0\] must be contiguous torch.int64"),
    "groups": (dict(cols=[torch.zeros(2, 4, dtype=torch.int64)]), "2 lines, which do not divide 3"),
    "step": (dict(step=2**32), "step = 4294967296"),
    "numbers": (dict(numbers=torch.zeros(3, dtype=F64)), "numbers must be two contiguous float64"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals_of_noise(name):
    change, message = REFUSALS[name]
    change = {
        k: [t.to(DEVICE) if isinstance(t, Tensor) else t for t in v] if isinstance(v, list) else v
        for k, v in change.items()
    }
    p = torch.zeros(3, 4, device=DEVICE)
    with pytest.raises(RuntimeError, match=f"^demp_update_: .*{message}"):
        update([p], **change)
    assert not p.any()


# Flags


def look(y, dim=1, criterion="ever_active", tau=0.0, start=None):
    found = torch.zeros(y.shape[dim], dtype=torch.uint8, device=DEVICE) if start is None else start.clone()
    count = torch.tensor([5], device=DEVICE)
    detector.active_flags_(y.to(DEVICE) if y.device.type != DEVICE else y, found, count, dim, criterion, tau)
    assert int(count) == 5 + y.shape[0]
    return found.tolist()


FLAG_SHAPES = [((3, 7, 5, 4), 1), ((70, 67), 1), ((4, 6, 11), -1), ((9, 5), 0), ((2, 3, 700), 1), ((2, 3, 4, 5, 6), 2),
               ((7,), 0), ((1, 200), 1)]  # fmt: skip


@pytest.mark.parametrize(("shape", "dim"), FLAG_SHAPES, ids=str)
@each_criterion
def test_flags_against_the_judge(criterion, shape, dim):
    every = [(F32, 0.0), (BF16, 0.6), (F64, 0.05), (F16, 0.05)]
    for dtype, tau in every if dim == 1 and len(shape) == 4 else every[:1]:
        y = activation(shape, dtype, dim)
        assert look(y, dim, criterion, tau) == judge(y, dim, criterion, tau), dtype


@each_criterion
def test_flags_of_layouts(criterion):
    y = activation((3, 37, 6, 5), F32)
    for layout in ("channels_last", "transposed", "every_second", "misaligned"):
        t = lay(y, layout)
        assert look(t, 1, criterion, 0.05) == judge(t, 1, criterion, 0.05), layout
    inner = torch.cat([torch.full_like(y[:, :3], 9), y, torch.full_like(y[:, :3], 9)], 1)[:, 3:-3]
    rows = y[:, :, 0, 0]
    for t in (inner, rows.t().contiguous().t(), rows[::2], rows[:, 3:], inner.to(memory_format=torch.channels_last)):
        assert look(t, 1, criterion, 0.05) == judge(t, 1, criterion, 0.05)


@each_criterion
def test_flags_of_what_is_not_finite(criterion):
    """NaN and +Inf are live by every rule, -Inf by those that look at sizes; no other channel changes for it."""
    for layout in ("contiguous", "channels_last"):
        y = lay(torch.zeros(3, 40, 4, 4), layout)
        y[2, 17, 3, 1] = NAN
        assert [c for c, live in enumerate(look(y, 1, criterion, 0.1)) if live] == [17]
    y = torch.zeros(2, 6)
    y[0, 1], y[1, 2], y[1, 4] = torch.inf, -torch.inf, 0.5
    expected = {"abs_max": [1, 2, 4], "dormant": [1, 2, 4]}.get(criterion, [1, 4])
    assert [c for c, live in enumerate(look(y, 1, criterion)) if live] == expected


@each_criterion
def test_flags_are_kept_and_nothing_seen_is_nothing_live(criterion):
    start = torch.tensor([1, 0, 7, 0, 0], dtype=torch.uint8, device=DEVICE)
    assert look(-torch.zeros(3, 5), 1, criterion, 0.0, start) == start.tolist()
    for shape in ((0, 4), (0, 4, 3), (3, 4, 0)):
        assert look(torch.ones(shape), 1, criterion) == [0] * 4


@pytest.mark.parametrize("criterion", CRITERIA[:3])
def test_flagged_channels_are_not_read(criterion, monkeypatch):
    """A NaN would set the flag of a channel; those that are set keep their numbers whatever lies there."""
    y = torch.full((2, 3, 600), NAN)
    y[:, 1] = -1
    start = torch.tensor([3, 0, 3], dtype=torch.uint8, device=DEVICE)
    assert look(y, 1, criterion, 0.0, start) == [3, int(criterion == "abs_max"), 3]


def test_flags_of_many_programs(monkeypatch):
    """Programs that share the places of a tile find what one alone finds, sums add up in order."""
    y = activation((700, 70), F32)
    expected = {c: look(y, 1, c, 0.05) for c in CRITERIA}
    monkeypatch.setattr(detector, "PROGRAMS", 22)
    assert {c: look(y, 1, c, 0.05) for c in CRITERIA} == expected


# The ops, and what the modules promise


def test_the_ops_run_on_triton(monkeypatch):
    """By argument and by TORSION_BACKEND; version counters move, the generator does not."""
    calls: list[str] = []
    for name in ("philox_normal_", "demp_update_", "active_flags_"):
        kernel = getattr(demp, name)
        monkeypatch.setattr(demp, name, lambda *a, kernel=kernel, name=name: (calls.append(name), kernel(*a))[1])
    before = torch.get_rng_state()
    p = torch.nn.Parameter(torch.ones(3, 4, device=DEVICE))
    found, count = torch.zeros(4, dtype=torch.uint8, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    version = p._version, found._version, count._version

    def run(**options: Any) -> None:
        torsion.ops.philox_normal((5,), 1, 2, 3, device=DEVICE, **options)
        torsion.ops.demp_update_([p], [None], [None], [None], [None], [4], 0.1, 1, 2, [3], **options)
        torsion.ops.active_flags_(torch.ones(3, 4, device=DEVICE), found, count, **options)

    run(backend="triton")
    q = torch.nn.Parameter(torch.ones(3, 4, device=DEVICE))
    sigma, step = torch.tensor(0.1, dtype=torch.float64, device=DEVICE), torch.tensor(2, device=DEVICE)
    torsion.ops.demp_update_([q], [None], [None], [None], [None], [4], sigma, 1, step, [3], backend="triton")
    assert torch.equal(p, q)
    calls.pop()
    assert calls == ["philox_normal_", "demp_update_", "active_flags_"]
    assert all(now > then for now, then in zip((p._version, found._version, count._version), version, strict=True))
    assert found.all()
    assert int(count) == 3
    assert p.is_leaf
    run(backend="reference")
    assert len(calls) == 3
    monkeypatch.setenv("TORSION_BACKEND", "triton")
    run()
    assert len(calls) == 6
    assert all("triton" in _backends.KERNELS[op] for op in ("philox_normal", "demp_update_", "active_flags_"))
    assert torch.equal(torch.get_rng_state(), before)


def test_tensors_of_the_wrong_kind_of_device(monkeypatch):
    monkeypatch.setattr(normals, "INTERPRETED", not engine.INTERPRETED)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        normals.philox_normal_(torch.zeros(3, device=DEVICE), 1, 2, 3)


def test_nothing_waits_for_the_device(monkeypatch):
    p, live = torch.randn(6, 40, device=DEVICE), torch.ones(6, dtype=torch.uint8, device=DEVICE)
    found, count = torch.zeros(40, dtype=torch.uint8, device=DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    x, w, b, inputs, outputs = layer(9, 45, 27, 19, 13, F32)
    numbers = torch.tensor([0.1, 4], dtype=F64, device=DEVICE)

    def run() -> None:
        normals.philox_normal_(p, 1, 2, 3)
        update([p], numbers=numbers, row_live=[live])
        for criterion in CRITERIA:
            detector.active_flags_(p, found, count, 1, criterion, 0.1)
        masked.masked_linear_forward(x, w, b, inputs, outputs, "relu", False, False, True)

    run()  # tables are laid on the host, once
    for name in ("item", "cpu", "__bool__", "__float__", "__int__", "__index__", "numpy"):
        monkeypatch.setattr(Tensor, name, lambda *_: pytest.fail("a wait for the device"))
    run()


@pytest.mark.parametrize("module", [normals, demp, detector, masked], ids=["normals", "demp", "flags", "masked"])
def test_audit_cases_name_every_argument(module):
    cases = list(module.audit_cases())
    assert len({c["name"] for c in cases}) == len(cases)
    for case in cases:
        assert set(case["kernel"].arg_names) == set(case["signature"])
        assert {a for a, t in case["signature"].items() if t == "constexpr"} == set(case["constexprs"])
