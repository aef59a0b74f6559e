"""The Triton kernels on a Step: against float64 equations, plain Philox and themselves.

In the interpreter where there is no GPU. The optimizers on top are compared with the judge in the modules of each
subject.
"""

from __future__ import annotations

import copy
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import tolerances
import torch
from helpers import exact_root, hyper, same_bits
from tolerances import close
from torch import Tensor

from torsion import reference
from torsion.ops._frame import Step
from torsion.ops._rules import ADATAM, TAM, Rule

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from test_triton_rounding import down_or_up, plain_noise  # noqa: E402

from torsion.triton_kernels import adatam, engine, table, tam  # noqa: E402

pytestmark = [
    pytest.mark.triton,
    pytest.mark.backend("triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
DEVICE = "cpu" if engine.INTERPRETED else "cuda"
MODULES: dict[str, Any] = {"tam": tam, "adatam": adatam}
F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
NAN = float("nan")
each_rule = pytest.mark.parametrize("rule", [TAM, ADATAM], ids=lambda r: r.name)


@pytest.fixture(autouse=True)
def _no_tables_left() -> None:
    table._tables.clear()


def step_of(
    rule: Rule, tensors: Sequence[tuple[int, torch.dtype]], *groups: dict[str, float], **arguments: Any
) -> Step:
    """A step over (elements, dtype) in the midst of a training; one scope and one group unless told otherwise."""
    n = len(tensors)

    def randoms(wide: bool) -> list[Tensor]:
        kinds = [(F64 if t == F64 else F32) if wide else t for _, t in tensors]
        return [torch.randn(k).to(DEVICE, t) for (k, _), t in zip(tensors, kinds, strict=True)]

    states = [randoms(True), [t.square() for t in randoms(True)]][: len(rule.states)]
    given: dict[str, Any] = {"scopes": [0] * n, "groups": [0] * n, "slots": list(range(n)), "lrs": []} | arguments
    shared = torch.rand(1 + max(given["scopes"], default=0), 3, dtype=F64, device=DEVICE)
    steps = torch.full((1 + max(given["slots"], default=0),), 3.0, device=DEVICE)
    status = torch.tensor([5, 0, 0, 0], device=DEVICE)
    return Step(randoms(False), randoms(False), states, shared, steps, status, hyper(rule, *groups), **given)


def written(step: Step) -> list[Tensor]:
    return [*step.params, *(t for s in step.states for t in s), step.shared, step.steps]


def number(status: Tensor) -> float:
    return struct.unpack("d", struct.pack("q", int(status)))[0]


class Model:
    """One step in float64 from the equations of csrc/rules, with Python's branches."""

    def __init__(self, rule: Rule, step: Step) -> None:
        rows = [dict(zip(rule.hyper, row, strict=True)) for row in step.hyper.tolist()]
        rates = iter(step.lrs)
        self.rows = [r | {"lr": float(next(rates))} if r["lr"] != r["lr"] else r for r in rows]
        self.of = [self.rows[g] for g in step.groups]
        scale = 1.0 if step.grad_scale is None else float(step.grad_scale)
        self.grads = [
            g.double() / (-scale if h["maximize"] else scale) for g, h in zip(step.grads, self.of, strict=True)
        ]
        self.steps = step.steps.tolist()
        self.first = [h.get("clone", 0) != 0 and self.steps[s] == 0 for h, s in zip(self.of, step.slots, strict=True)]
        self.sums = torch.zeros(len(step.shared) + 1, 3, dtype=F64, device=step.shared.device)
        for i, (g, m) in enumerate(zip(self.grads, step.states[0], strict=True)):
            m = m.double()
            weight = step.weights[i] if step.weights else 1.0
            for row in {-1} if self.first[i] else {-1, step.scopes[i]}:
                self.sums[row] += weight * torch.stack([(m * g).sum(), (g * g).sum(), (m * m).sum()])
        self.norm = float(self.sums[-1, 1].sqrt())
        limit = math.inf if step.max_grad_norm is None else step.max_grad_norm
        self.clip = min(1.0, limit / (self.norm + 1e-6))
        self.shared = step.shared.double().clone()
        for scope in set(step.scopes):
            mg, gg, mm = self.sums[scope].tolist()
            s = mg / math.sqrt(gg * mm) if gg * mm else 0.0
            decay = self.of[step.scopes.index(scope)]["decay"]
            smoothed = decay * float(self.shared[scope, 0]) + (1 - decay) * s
            self.shared[scope] = torch.tensor([smoothed, s, (1 + smoothed) / 2], dtype=F64)
        self.params, self.states = [], [[] for _ in rule.states]
        for i in range(len(step.params)):
            move = self._adatam if rule is ADATAM else self._tam
            theta, *states = move(step, i)
            self.params.append(theta)
            for column, new in zip(self.states, states, strict=True):
                column.append(new)

    def _momentum(self, step: Step, i: int, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        h, theta, m = self.of[i], step.params[i].double(), step.states[0][i].double()
        grad = self.clip * self.grads[i]
        force = grad if h["decoupled"] else grad + h["weight_decay"] * theta
        damping = h["eps_damping"] + float(self.shared[step.scopes[i], 2])
        shrunk = theta * (1 - h["lr"] * h["weight_decay"]) if h["decoupled"] else theta
        return shrunk, force if self.first[i] else beta * m + damping * force, grad

    def _tam(self, step: Step, i: int) -> tuple[Tensor, ...]:
        theta, m, _ = self._momentum(step, i, self.of[i].get("momentum", 0))
        return theta - self.of[i]["lr"] * m, m

    def _adatam(self, step: Step, i: int) -> tuple[Tensor, ...]:
        h = self.of[i]
        theta, m, grad = self._momentum(step, i, h["beta1"])
        v = h["beta2"] * step.states[1][i].double() + (1 - h["beta2"]) * grad * grad
        t = self.steps[step.slots[i]] + 1
        corrected = v / (1 - h["beta2"] ** t) if h["bias_correction"] else v
        return theta - h["lr"] * m / (corrected.sqrt() + h["eps"]), m, v


def check_steps(rule: Rule, step: Step, n: int = 2) -> None:
    """Takes n steps and compares each with the model, which starts from what is stored."""
    for _ in range(n):
        model, before = Model(rule, copy.deepcopy(step)), step.steps.clone()
        MODULES[rule.name].step_(step)
        for i, p in enumerate(step.params):
            noisy = model.of[i]["stochastic"] and p.dtype in (BF16, F16)
            stored = (tolerances.STORED_STOCHASTIC if noisy else tolerances.STORED)[p.dtype]
            close(p, model.params[i], stored, f"params[{i}]")
            for k, state in enumerate(step.states):
                close(state[i], model.states[k][i], tolerances.STATE[p.dtype], f"states[{k}][{i}]")
        close(step.shared, model.shared, tolerances.COSINE[step.shared.dtype], "shared")
        before[step.slots] += 1
        assert torch.equal(step.steps, before)
        skipped, norm, skip, clip = step.status.tolist()
        assert (skipped, skip) == (5, 0)
        assert (number(norm), number(clip)) == pytest.approx((model.norm, model.clip), rel=1e-6)


SMALL = [(7, F32), (333, F32)]
TWO = {"scopes": [0, 1], "groups": [1, 0]}
GROUPS = ({"lr": 0.01}, {"lr": 0.05, "weight_decay": 0.1})
CASES: dict[str, Callable[[Rule], Step]] = {
    "coupled": lambda r: step_of(r, SMALL, *GROUPS, **TWO),
    "decoupled": lambda r: step_of(r, SMALL, {"lr": 0.1, "weight_decay": 0.3, "decoupled": 1}),
    "maximize one group": lambda r: step_of(r, SMALL, {"maximize": 1}, {}, groups=[0, 1]),
    "scaled and clipped": lambda r: step_of(
        r, SMALL, max_grad_norm=0.5,
        grad_scale=torch.tensor(8.0, device=DEVICE), found_inf=torch.zeros(1, device=DEVICE),
    ),
    "clip above the norm": lambda r: step_of(r, SMALL, max_grad_norm=1e9),
    "rates in tensors": lambda r: step_of(
        r, [*SMALL, (1, F32)], {"lr": NAN}, {"lr": 0.2}, {"lr": NAN}, groups=[2, 1, 0],
        lrs=[torch.tensor(0.05, device=DEVICE), torch.tensor([0.3], dtype=F64)],
    ),
    "weights, slots out of order": lambda r: step_of(r, SMALL, weights=[0.5, 0.25], slots=[4, 1]),
    "scopes apart, one without a tensor": lambda r: step_of(r, SMALL, scopes=[3, 1]),
    "every kind": lambda r: step_of(
        r, [(33, F32), (65, F64), (12, BF16), (40, F16), (9, BF16), (30, F16), (0, F32)],
        {"weight_decay": 0.1}, {"stochastic": 1, "seed": 7}, groups=[0, 0, 0, 0, 1, 1, 1], scopes=[0, 1, 0, 1, 0, 1, 0],
    ),
}  # fmt: skip


@each_rule
@pytest.mark.parametrize("case", CASES)
def test_a_step(case, rule):
    check_steps(rule, CASES[case](rule))


@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_sizes(dtype):
    """Chunks and blocks, whole and begun; on 16-byte addresses and off them."""
    sizes = [0, 1, 7, 333, table.CHUNK.value, table.CHUNK.value + 5, engine.BLOCK + 8]
    step = step_of(TAM, [(n, dtype) for n in sizes], {"lr": 1e-3})  # one element must not cancel
    check_steps(TAM, step, 1)
    (plan,) = table._tables.values()
    assert plan.rows[:, table.ROW_VECTOR.value].tolist() == [1] * 7
    step.params[-1] = torch.randn(engine.BLOCK + 9).to(DEVICE, dtype)[1:]
    check_steps(TAM, step, 1)
    plan = list(table._tables.values())[-1]
    assert plan.rows[:, table.ROW_VECTOR.value].tolist() == [1] * 6 + [0]


@pytest.mark.parametrize("shared", [F32, F64], ids=str)
def test_clone_and_late_tensors(shared):
    """A tensor's first step seeds its momentum; only its scope's cosine leaves it out."""
    step = step_of(TAM, [(33, F32)] * 3, {"clone": 1, "weight_decay": 0.1}, {}, scopes=[0, 0, 1], groups=[0, 0, 1])
    step.shared = step.shared.to(shared)
    step.steps[1:] = 0
    sums = tam.reduce(step)
    close(sums, Model(TAM, step).sums, tolerances.SUMS, "sums")
    assert not torch.equal(sums[0] + sums[1], sums[2])
    check_steps(TAM, step)


def test_bias_correction():
    step = step_of(ADATAM, SMALL, {"bias_correction": 1}, {"bias_correction": 1, "beta2": 0.0}, groups=[0, 1])
    step.steps.zero_()
    check_steps(ADATAM, step, 3)


@each_rule
def test_halves_of_a_step_make_a_whole(rule):
    module = MODULES[rule.name]
    step = step_of(rule, SMALL, *GROUPS, **TWO, weights=[0.5, 1.0], max_grad_norm=1.0)
    whole = copy.deepcopy(step)
    sums = module.reduce(step)
    close(sums, Model(rule, step).sums, tolerances.SUMS, "sums")
    module.apply_(step, sums)
    module.step_(whole)
    assert same_bits([*written(step), step.status], [*written(whole), whole.status])


@each_rule
@pytest.mark.parametrize("what", ["grad", "state", "found_inf"])
def test_a_skipped_step_writes_its_status_alone(what, rule):
    step = step_of(rule, [(7, F32), (engine.BLOCK + 1, BF16)], {"stochastic": 1})
    if what == "found_inf":
        step.found_inf = torch.ones(1, device=DEVICE)
    else:
        (step.grads if what == "grad" else step.states[0])[1][-1] = math.inf if what == "state" else NAN
    before = copy.deepcopy(written(step))
    for n in (6, 7):
        MODULES[rule.name].step_(step)
        skipped, norm, skip, _clip = step.status.tolist()
        assert (skipped, skip) == (n, 1)
        assert math.isnan(number(norm)) if what == "grad" else number(norm) == math.inf
    assert same_bits(written(step), before)


@each_rule
def test_two_runs_are_bitwise_equal(rule):
    first = step_of(rule, [(engine.BLOCK + 9, F32), (50, BF16), (70, F64)], {"stochastic": 1, "seed": 3})
    second = copy.deepcopy(first)
    for step in (first, second):
        MODULES[rule.name].step_(step)
        table._tables.clear()
    assert same_bits([*written(first), first.status], [*written(second), second.status])


@each_rule
def test_same_bits_as_the_reference(rule, monkeypatch):
    """Operation by operation the same maths, so rounding agrees as well."""
    monkeypatch.setattr(Tensor, "sqrt", exact_root)
    groups = {"lr": 0.1, "weight_decay": 0.1, "bias_correction": 1}, {"stochastic": 1, "seed": 11}
    kinds = [(engine.BLOCK + 5, F32), (50, BF16), (70, F16), (2 * engine.BLOCK + 13, BF16), (9, F16)]
    ours = step_of(rule, kinds, *groups, groups=[0, 0, 0, 1, 1], keys=[0, 0, 0, 16, 3], max_grad_norm=3.0)
    theirs = copy.deepcopy(ours)
    for _ in range(2):
        MODULES[rule.name].step_(ours)
        getattr(reference, rule.op)(theirs)
    assert same_bits(ours.params + ours.states[0], theirs.params + theirs.states[0])


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("key", [0, (1 << 35) + 5], ids=["blocks and a tail", "odd key"])
def test_stochastic_rounding_is_plain_philox(key, dtype):
    n, seed = 2 * engine.BLOCK + 13, (1 << 40) + 7
    step = step_of(TAM, [(n, dtype)], {"stochastic": 1, "seed": float(seed)}, slots=[2], keys=[key])
    # The same step in float32 gives the numbers before they are rounded. Away from 0, so that none is subnormal.
    step.params[0] = step.params[0].sign() + 3 * step.params[0]
    exact = copy.deepcopy(step)
    exact.params, exact.grads = [t.float() for t in step.params], [t.float() for t in step.grads]
    for s in (step, exact):
        tam.step_(s)
    assert exact.params[0].abs().min() > 2.0**-14
    expected = down_or_up(exact.params[0].cpu(), dtype, plain_noise(n, seed, key, 4, 2))
    assert same_bits(step.params, [expected])
    assert not torch.equal(expected, exact.params[0].cpu().to(dtype))


# Tables


def test_a_table_follows_addresses_numbers_and_structure():
    step = step_of(TAM, SMALL)
    tam.step_(step)
    (kept,) = table._tables.values()
    step.grads = [torch.randn_like(g) for g in step.grads]
    check_steps(TAM, step, 1)
    step.hyper[0, 0] = 0.5
    check_steps(TAM, step, 1)
    step.max_grad_norm = 0.1
    check_steps(TAM, step, 1)
    assert list(table._tables.values()) == [kept]
    step.scopes, step.shared = [0, 1], torch.zeros(2, 3, device=DEVICE)
    check_steps(TAM, step, 1)
    assert list(table._tables.values()) != [kept]


def test_a_refused_step_leaves_the_table_usable():
    step = step_of(TAM, SMALL)
    check_steps(TAM, step, 1)
    good, states = step.grads, step.states
    step.grads, step.states = [g.clone() for g in good], [[torch.zeros(8, 2, device=DEVICE), *states[0][1:]]]
    with pytest.raises(RuntimeError, match="list 2, tensor 0 differs from its parameter in sizes"):
        tam.step_(step)
    del step.grads
    step.grads, step.states = good, states
    check_steps(TAM, step, 1)


def test_dense_tensors_of_any_stride_and_their_surroundings():
    """channels_last needs no copy; not an element beside a tensor is touched."""
    step = step_of(TAM, [(3 * 4 * 5 * 5, F32), (engine.BLOCK + 3, BF16)])
    rooms = []

    def framed(t: Tensor) -> Tensor:
        room = t.new_full((t.numel() + 32,), 77.0)
        rooms.append(room)
        room[16:-16] = t
        return room[16:-16]

    for stream in (step.params, step.grads, *step.states):
        for i, t in enumerate(stream):
            t = framed(t)
            stream[i] = t.view(3, 5, 5, 4).permute(0, 3, 1, 2) if i == 0 else t
    assert step.params[0].is_contiguous(memory_format=torch.channels_last)
    check_steps(TAM, step)
    assert all((room[:16] == 77).all() and (room[-16:] == 77).all() for room in rooms)


def test_nothing_waits_for_the_device(monkeypatch):
    steps = [step_of(ADATAM, SMALL, {"lr": NAN}, lrs=[torch.tensor(0.1, device=DEVICE)], max_grad_norm=1.0)]
    adatam.step_(steps[0])
    for name in ("item", "cpu", "__bool__", "__float__", "__int__", "__index__", "numpy"):
        monkeypatch.setattr(Tensor, name, lambda *_: pytest.fail("a wait for the device"))
    adatam.step_(steps[0])
    adatam.apply_(steps[0], adatam.reduce(steps[0]))


def test_no_tensors():
    step = step_of(TAM, [])
    before = step.shared.clone()
    tam.step_(step)
    assert torch.equal(step.shared, before)
    assert step.status.tolist()[:3] == [5, 0, 0]


@triton.jit
def _open_kernel(rows, pieces, numbers, scale, out, H: tl.constexpr, BLOCK: tl.constexpr):
    _row, _record, _hyper, begin, whole, end, _pre = engine.open_piece(rows, pieces, numbers, scale, H, BLOCK)
    tl.store(out, begin)
    tl.store(out + 1, whole)
    tl.store(out + 2, end)


def test_addresses_beyond_two_to_the_31():
    """The table of a tensor that is not there, and what a kernel makes of its last chunk."""
    step, n = step_of(TAM, [(1, F32)]), 2**33 + 5
    huge = torch.empty(n, device="meta")
    step.params, step.grads, step.states = [huge], [huge], [[huge]]
    plan = table.Table(tam.RULE, step, [])
    chunks = 2**33 // table.CHUNK.value + 1
    assert (plan.n_pieces, plan.launches[0].pieces[-1].tolist()) == (chunks, [0, chunks - 1, chunks - 1, 0])
    out = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    arguments = plan.host_rows.to(DEVICE), plan.launches[0].pieces[-1:].contiguous(), step.hyper.to(DEVICE), plan.one
    _open_kernel[(1,)](*arguments, out, H=10, BLOCK=engine.BLOCK)
    assert out.tolist() == [2**33, 0, 5]


# Refusals


REFUSALS: dict[str, tuple[Callable[[Step], Any], str]] = {
    "too few gradients": (lambda s: s.grads.pop(), "lists differ in length"),
    "an integer parameter": (
        lambda s: s.params.__setitem__(1, torch.ones(333, dtype=torch.int32)),
        r"params\[1\] must be",
    ),
    "a hole": (lambda s: s.params.__setitem__(0, torch.ones(14)[::2]), r"params\[0\] has holes"),
    "state of another dtype": (
        lambda s: s.states[0].__setitem__(1, torch.ones(333, dtype=F64)),
        "list 2, tensor 1 must be",
    ),
    "a scope too many": (lambda s: s.scopes.__setitem__(0, 1), r"scopes\[0\] = 1 is outside"),
    "no rate": (lambda s: s.hyper.fill_(NAN), "asks for 1 learning rates, lrs holds 0"),
    "sums for steps": (lambda s: setattr(s, "steps", s.steps.double()), "steps must be"),
    "half of the columns": (lambda s: setattr(s, "hyper", s.hyper[:, :5]), "hyper must be .* 10 columns"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    step = step_of(TAM, SMALL)
    change, message = REFUSALS[case]
    change(step)
    before = copy.deepcopy(written(step))
    with pytest.raises(RuntimeError, match=f"^tam: .*{message}"):
        tam.step_(step)
    assert same_bits(written(step), before)


def test_tensors_of_the_wrong_kind_of_device(monkeypatch):
    step = step_of(TAM, SMALL)
    monkeypatch.setattr(engine, "INTERPRETED", not engine.INTERPRETED)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        tam.step_(step)


@pytest.mark.parametrize("module", [tam, adatam], ids=["tam", "adatam"])
def test_audit_cases_name_every_argument(module):
    cases = list(module.audit_cases())
    assert len({c["name"] for c in cases}) == len(cases) == 13
    for case in cases:
        assert list(case["kernel"].arg_names) == sorted(case["signature"], key=case["kernel"].arg_names.index)
        assert {a for a, t in case["signature"].items() if t == "constexpr"} == set(case["constexprs"])
