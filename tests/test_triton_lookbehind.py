"""What only the Triton passes of a Lookbehind cycle have: launches, tables that passes share, memory around tensors."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from helpers import Target, same_bits
from passes import BF16, F16, F32, F64, NAMES, base_of, check, n_sums, phase_of, written
from torch import Tensor

from torsion.ops._cycle import RULES
from torsion.ops._frame import Phase
from torsion.ops._rules import columns

pytest.importorskip("triton")
from torsion.triton_kernels import engine, lookbehind, table

pytestmark = [
    pytest.mark.triton,
    pytest.mark.backend("triton"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
DEVICE = "cpu" if engine.INTERPRETED else "cuda"
TARGET = Target("triton", "triton", DEVICE, engine.INTERPRETED)
CYCLE = ["opening_ascent", "descent_ascent/tam", "descent_ascent/tam", "descent/tam", "blend/adaptive"]


@pytest.fixture(autouse=True)
def _no_tables_left() -> None:
    table._tables.clear()


class Weights:
    """The tensors of a cycle of three descents on TAM, with an adaptive alpha, and the phases over them."""

    def __init__(self, *dtypes: torch.dtype) -> None:
        tensors = [(12, t) for t in dtypes]
        whole = phase_of("descent_ascent/tam", tensors)
        self.whole = Phase(**{k: self._move(v) if k != "hyper" else v for k, v in vars(whole).items()})
        self.fast, self.first = ([torch.zeros_like(s) for s in self.whole.slow] for _ in range(2))
        self.alphas = torch.zeros(1, 1, dtype=F64, device=DEVICE)
        self.n = len(tensors)

    def _move(self, x: Any) -> Any:
        moved = self.__dict__.setdefault("_moved", {})
        if isinstance(x, Tensor):
            return moved.setdefault(id(x), x.to(DEVICE))
        return [self._move(y) for y in x] if isinstance(x, list) else x

    def phases(self, new_gradients: bool) -> Sequence[Phase]:
        whole, route = self.whole, {1: ("slow", "first"), 2: ("first", "fast"), 3: ("fast", "perturbed")}
        buffers = {"slow": whole.slow, "perturbed": whole.perturbed, "fast": self.fast, "first": self.first}
        made = []
        for i, rule in enumerate(CYCLE):
            phase = copy.copy(whole)
            phase.rule, phase.opens = rule, i == 0
            source, target = route.get(i, ("perturbed", "perturbed"))
            phase.source, phase.target = (buffers[source], buffers[target]) if "descent" in rule else ([], [])
            if rule.startswith("blend"):
                phase.source, phase.first, phase.shared = whole.perturbed, self.first, self.alphas
            if "descent" not in rule:
                phase.states, phase.hyper = [], whole.hyper[:, [*range(6), 10, 11, 12]]
            if new_gradients:
                phase.grads = [torch.randn_like(g) for g in whole.grads]
            made.append(phase)
        return made


def launches(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts kernels as they are launched."""
    counts: Counter[str] = Counter()
    kernel = type(engine.reduce_kernel)
    launch = kernel.__getitem__

    def counted(self: Any, grid: Any) -> Any:
        counts[self.fn.__name__] += 1
        return launch(self, grid)

    monkeypatch.setattr(kernel, "__getitem__", counted)
    return counts


@pytest.mark.parametrize("spoilt", [False, True], ids=["taken", "skipped"])
@pytest.mark.parametrize("n", [1, 5])
def test_four_launches_a_pass(n, spoilt, monkeypatch):
    """Whatever the number of tensors, and whether the pass is taken: nobody waits to know."""
    phases = Weights(*[F32] * n).phases(False)
    if spoilt:
        phases[0].grads[0][0] = float("nan")
    for phase in phases:
        counts = launches(monkeypatch)
        lookbehind.step_(phase)
        monkeypatch.undo()
        assert counts == dict.fromkeys(("reduce_kernel", "add_up_kernel", "finalize_kernel", "update_kernel"), 1)


def test_an_interpolation_with_a_fixed_alpha_needs_no_sums(monkeypatch):
    phase = phase_of("blend", [(9, F32), (9, F32)])
    counts = launches(monkeypatch)
    lookbehind.step_(phase)
    assert counts == {"finalize_kernel": 1, "update_kernel": 1}
    assert not lookbehind.reduce(phase).any()


def test_nothing_waits_for_the_device(monkeypatch):
    phases = Weights(F32, BF16).phases(False)
    for phase in phases:
        lookbehind.step_(phase)
    for name in ("item", "cpu", "__bool__", "__float__", "__int__", "__index__", "numpy"):
        monkeypatch.setattr(Tensor, name, lambda *_: pytest.fail("a wait for the device"))
    for phase in phases:
        lookbehind.step_(phase)


# Tables


def sends(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What is sent to the device."""
    sent: list[Tensor] = []
    send = table._send
    monkeypatch.setattr(table, "_send", lambda host, *rest: sent.append(host) or send(host, *rest))
    return sent


@pytest.mark.parametrize("dtypes", [(F32, F64), (F32, BF16)], ids=["full", "half"])
def test_the_passes_of_a_cycle_share_tables(dtypes, monkeypatch):
    """One for gradients and one for the scopes of alpha. Once they know the buffers only gradients are sent again."""
    weights = Weights(*dtypes)
    for phase in weights.phases(False):
        lookbehind.step_(phase)
    assert len(table._tables) == 2
    sent = sends(monkeypatch)
    for phase in weights.phases(False):
        lookbehind.step_(phase)
    assert not sent
    for phase in weights.phases(True):
        lookbehind.step_(phase)
    assert len(sent) == 4
    assert all(host.shape == (2, table.ROW_WIDTH.value) for host in sent)
    assert len(table._tables) == 2


@pytest.mark.parametrize("dtypes", [(F32, F64), (BF16, F16)], ids=["full", "half"])
def test_cycles_on_shared_tables_are_those_on_fresh_ones(dtypes):
    """Each pass finds the buffers it means, wherever in a row their addresses went."""
    shared = Weights(*dtypes)
    fresh = copy.deepcopy(shared)
    for _ in range(2):
        for ours, theirs in zip(shared.phases(False), fresh.phases(False), strict=True):
            lookbehind.step_(ours)
            table_of_ours = dict(table._tables)
            table._tables.clear()
            lookbehind.step_(theirs)
            table._tables.clear()
            table._tables.update(table_of_ours)
            everything = [[*written(p), *p.source, p.status] for p in (ours, theirs)]
            assert same_bits(*everything)


def test_more_buffers_than_a_row_has_room_for():
    phase = phase_of("descent_ascent/sgd", [(9, F32)])
    for _ in range(4):
        check(phase, TARGET)
        phase.source, phase.target = [[torch.randn(9)] for _ in range(2)]


def test_a_table_follows_the_flags_of_asam():
    phase = phase_of("ascent/asam", [(9, F32), (9, F32)])
    check(phase, TARGET)
    phase.scaled = [False, True]
    check(phase, TARGET)


@pytest.mark.parametrize("rule", ["opening_ascent", "descent_ascent/adam", "descent_blend/sgd_momentum"])
def test_not_an_element_beside_a_tensor_is_touched(rule):
    """Neither by a pass that is taken nor by one that restores."""
    phase = phase_of(rule, [(3 * 4 * 5, F32), (engine.BLOCK + 3, BF16)])
    rooms = []

    def framed(t: Tensor) -> Tensor:
        room = t.new_full((t.numel() + 32,), 77.0, device=DEVICE)
        rooms.append(room)
        room[16:-16] = t
        return room[16:-16]

    phase.params = [framed(t) for t in phase.params]
    phase.perturbed = [phase.params[0], framed(phase.perturbed[1])] if phase.perturbed else []
    for stream in (phase.grads, phase.slow, phase.source, phase.target, *phase.states):
        stream[:] = [framed(t) for t in stream]
    for name in ("shared", "steps", "status"):
        setattr(phase, name, getattr(phase, name).to(DEVICE))
    for spoilt in (False, True):
        if spoilt:
            phase.grads[0][0] = float("nan")
        lookbehind.step_(phase)
        assert int(phase.status[2]) == spoilt
    assert all((room[:16] == 77).all() and (room[-16:] == 77).all() for room in rooms)


# Refusals


REFUSALS: dict[str, tuple[Callable[[Phase], Any], str]] = {
    "no slow weights": (lambda p: p.slow.clear(), "lists differ in length: 2 params, .* 0 slow"),
    "half of the state": (lambda p: setattr(p, "states", []), "takes 1 lists of state, has 0"),
    "another dtype": (
        lambda p: p.source.__setitem__(1, torch.ones(8, dtype=F64)),
        "source, tensor 1 must be torch.flo",
    ),
    "perturbed rounded": (lambda p: setattr(p, "perturbed", p.params), "perturbed, tensor 1 must be torch.float32"),
    "other sizes": (lambda p: p.target.__setitem__(0, torch.ones(7)), "target, tensor 0 differs from its parameter"),
    "other columns": (lambda p: setattr(p, "hyper", p.hyper[:, :9]), "hyper must be .* 13 columns"),
    "no cosines": (lambda p: setattr(p, "shared", torch.zeros(1, 0)), "shared must have 3 columns"),
    "flags": (lambda p: p.scaled.pop(), "lists differ in length"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case):
    phase = phase_of("descent_ascent/tam", [(8, F32), (8, BF16)])
    if DEVICE == "cuda":
        pytest.skip("refused before anything is launched; the lists of this test are on the CPU")
    change, message = REFUSALS[case]
    change(phase)
    before = copy.deepcopy(written(phase))
    with pytest.raises(RuntimeError, match=f"^descent_ascent/tam: .*{message}"):
        lookbehind.step_(phase)
    assert same_bits(written(phase), before)


def test_sums_that_do_not_fit():
    phase = phase_of("ascent", [(8, F32)])
    if DEVICE == "cuda":
        pytest.skip("refused before anything is launched; the lists of this test are on the CPU")
    with pytest.raises(RuntimeError, match=r"^ascent: sums must be contiguous float64 \[2, 1\]"):
        lookbehind.apply_(phase, torch.zeros(2, 3, dtype=F64))


# Rules and what is compiled ahead of time


def test_rules_are_the_compiled_ones():
    assert sorted(lookbehind.names()) == sorted(NAMES)
    for name in NAMES:
        rule = lookbehind.rule_of(name, name.startswith("opening"))
        assert (rule.hyper, rule.sums) == (len(columns(name)), n_sums(name))
        assert rule.states == (len(base_of(name).states) if base_of(name) else 0)
        if RULES:
            assert (rule.sums, rule.shared) == (RULES[name]["sums"], RULES[name]["shared"])


def test_audit_cases_name_every_argument():
    cases = list(lookbehind.audit_cases())
    assert len({c["name"] for c in cases}) == len(cases)
    for name in NAMES:
        assert any(c["name"].startswith(f"{name} ") for c in cases) or name == "blend/adaptive"
    for case in cases:
        assert list(case["kernel"].arg_names) == sorted(case["signature"], key=case["kernel"].arg_names.index)
        assert {a for a, t in case["signature"].items() if t == "constexpr"} == set(case["constexprs"])
