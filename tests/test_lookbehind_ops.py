"""The passes of a Lookbehind cycle on every back end: against float64 equations, each other, and what must stay."""

from __future__ import annotations

import math

import pytest
import tolerances
import torch
from helpers import CHUNK, TARGETS, Target, exact_root, same_bits
from passes import (
    BF16,
    F16,
    F32,
    F64,
    NAMES,
    Expected,
    base_of,
    check,
    halves,
    lists_of,
    n_sums,
    on,
    phase_of,
    planned,
    run,
    written,
)
from tolerances import SUMS, close
from torch import Tensor

import torsion
from torsion.ops import _native, columns
from torsion.ops._cycle import CLOSING, RULES, stream_names
from torsion.ops._rules import BASES

pytestmark = [
    pytest.mark.skipif(_native.plan is None, reason=_native.missing.get("_plan", "")),
    pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"),
]
REFERENCE = Target("reference", "reference")
each_pass = pytest.mark.parametrize("rule", NAMES)
MIXED = [(33, F32), ((5, 13), F64), (12, BF16), (40, F16), (0, F32)]
GROUPS = ({"lr": 0.01, "nesterov": 1, "clone": 1, "bias_correction": 1}, {"maximize": 1, "decoupled": 1, "rho": 0.3})
SPREAD = {"scopes": [0, 2, 0, 2, 2], "groups": [0, 1, 0, 1, 1], "slots": [5, 1, 2, 3, 4]}


@pytest.fixture(
    params=[
        pytest.param(
            t, id=t.id, marks=[pytest.mark.backend(t.backend), *([pytest.mark.cuda] if t.device == "cuda" else [])]
        )
        for t in TARGETS
        if t.backend != "reference"
    ]
)
def kernels(request):
    """Every back end but the reference."""
    return request.param


def mixed(rule: str, **more: object) -> object:
    """Every storage type, a group that maximizes, scopes of which one has no tensor, first steps beside later ones."""
    steps = torch.tensor([0.0, 3, 0, 2, 0, 5])
    return phase_of(rule, MIXED, *GROUPS, **SPREAD, steps=steps, **more)


@each_pass
def test_a_pass(rule, target):
    """Sums, all that is written and all that is not, against the judge."""
    limited = {"max_grad_norm": 2.0} if "tam" in rule else {}
    check(mixed(rule, **limited), target)


@pytest.mark.parametrize("rule", ["opening_ascent/asam", "descent_ascent/sgd_momentum", "blend/adaptive"])
def test_tensors_of_several_chunks(rule, target):
    check(phase_of(rule, [(CHUNK + 37, F32), (3, F32)]), target)


@pytest.mark.parametrize("rule", ["ascent", "descent_ascent/adam/asam", "descent_blend/tam"])
def test_weights_are_this_process_part_of_the_sums(rule, target):
    phase = phase_of(rule, [(7, F32), (5, F64)], weights=[0.5, 0.25])
    sums, _ = halves(on(phase, target.device), target)
    close(sums, Expected(phase).sums, SUMS)


@pytest.mark.parametrize("rule", ["descent_ascent/sgd_momentum", "descent_blend/adam"])
def test_rates_in_tensors(rule, target):
    nan = float("nan")
    lrs = [torch.tensor(0.07), torch.tensor([0.3], dtype=F64)]
    phase = phase_of(rule, [(7, F32)] * 3, {"lr": nan}, {"lr": 0.2}, {"lr": nan}, groups=[2, 1, 0], lrs=lrs)
    check(phase, target)


@each_pass
def test_the_same_sums_give_the_same_bits(rule, kernels, monkeypatch):
    """Operation by operation the reference's maths, so rounding agrees as well, at random too."""
    monkeypatch.setattr(Tensor, "sqrt", exact_root)
    groups = [{**group, "stochastic": 1, "seed": 7} for group in GROUPS]
    # Powers of beta agree to the last bits of a float64 only; the first is beta itself.
    steps = torch.full((6,), 0.0 if "adam" in rule else 2.0)
    phase = phase_of(rule, MIXED, *groups, **SPREAD, steps=steps, keys=[0, 8, 3, 16, 0])
    ours, theirs = on(phase, kernels.device), phase
    _, rest = halves(ours, kernels)
    sums, finish = halves(theirs, REFERENCE)
    rest(sums.to(kernels.device))
    finish(sums)
    for name, tensors in lists_of(ours).items():
        assert same_bits(tensors, lists_of(theirs)[name]), name


@pytest.mark.parametrize("rule", ["opening_ascent", "descent_ascent/tam/asam", "descent_blend/sgd", "blend/adaptive"])
def test_halves_of_a_pass_make_the_whole(rule, target):
    """Bit for bit as in one go; the first half writes nothing but its sums."""
    whole = on(mixed(rule), target.device)
    split = on(whole, target.device)
    before = on(split, target.device)
    run(whole, target)
    sums, rest = halves(split, target)
    assert same_bits([*written(split), split.status], [*written(before), before.status])
    rest(sums)
    assert same_bits([*written(split), split.status], [*written(whole), whole.status])


# Skipped passes


SKIPPED = [
    "opening_ascent",
    "opening_ascent/asam",
    "ascent",
    "descent_ascent/sgd_momentum",
    "descent_ascent/adatam/asam",
    "descent/tam",
    "descent_blend/adam",
    "blend/adaptive",
]


def spoil(phase: object, what: str) -> None:
    if what == "found_inf":
        phase.found_inf = torch.ones(1)
    elif phase.rule.startswith("blend"):
        phase.source[2][-1] = math.inf
    else:
        phase.grads[2][-1] = math.nan


@pytest.mark.parametrize(
    ("rule", "what"), [*((rule, "number") for rule in SKIPPED), *((rule, "found_inf") for rule in SKIPPED[::3])]
)
def test_a_skipped_pass_restores_the_slow_weights(rule, what, target):
    """The parameters are the slow weights, rounded; base, fast weights and scalars are as they were; counted once."""
    phase = mixed(rule)
    spoil(phase, what)
    phase = on(phase, target.device)
    before = on(phase, target.device)
    run(phase, target)
    slow = [t.clone() for t in before.params] if rule.startswith("opening") else before.slow
    assert same_bits(phase.params, [s.to(p.dtype) for s, p in zip(slow, phase.params, strict=True)])
    if phase.perturbed:
        assert same_bits(phase.perturbed, [s.to(q.dtype) for s, q in zip(slow, phase.perturbed, strict=True)])
        assert same_bits(phase.slow, [s.to(q.dtype) for s, q in zip(slow, phase.slow, strict=True)])
    kept, was = ([*p.target, *(t for s in p.states for t in s), p.shared, p.steps] for p in (phase, before))
    assert same_bits(kept, was)
    assert phase.status.tolist()[::2] == [6, 1]
    if not rule.startswith("blend"):
        assert not math.isfinite(phase.status.cpu().view(F64)[1])


@pytest.mark.parametrize("rule", ["ascent", "descent_ascent/adatam/asam", "descent_blend/adam", "blend/adaptive"])
def test_passes_after_a_skipped_one_do_nothing(rule, target):
    """Even when their own gradients are not finite either; the next opening pass goes on."""
    phase = mixed(rule)
    spoil(phase, "number")
    phase = on(phase, target.device)
    phase.status[2] = 1
    before = on(phase, target.device)
    for _ in range(2):
        run(phase, target)
        assert same_bits(written(phase), written(before))
        assert phase.status.tolist() == [5, 0, 2, 0]
    opening = on(mixed("opening_ascent"), target.device)
    opening.status = phase.status
    run(opening, target)
    assert phase.status.tolist()[::2] == [5, 0]


# The adaptive alpha


def blend(first: Tensor, last: Tensor, slow: Tensor, target: object) -> tuple[float, Tensor]:
    """Alpha and the new slow weights."""
    phase = phase_of("blend/adaptive", [(tuple(slow.shape), slow.dtype)])
    phase.first, phase.source, phase.slow = [first], [last], [slow]
    phase = on(phase, target.device)
    run(phase, target)
    return float(phase.shared[0, 0]), phase.params[0].cpu()


def test_no_displacement_gives_a_half_and_moves_nothing(target):
    s = torch.randn(50)
    alpha, new = blend(torch.randn(50), s, s, target)
    assert alpha == 0.5
    assert same_bits([new], [s])


def test_one_direction_gives_the_fast_weights_and_opposite_ones_the_slow(target):
    s, d = torch.randn(50), torch.randn(50)
    alpha, new = blend(s + d, s + d, s, target)
    assert alpha == pytest.approx(1, abs=1e-15)
    assert alpha <= 1
    zero = torch.zeros(50)
    alpha, new = blend(-d, 2 * d, zero, target)
    assert 0 <= alpha <= 1e-15
    assert new.abs().max() < 1e-14


@pytest.mark.parametrize("size", [1e-20, 1e-30])
def test_a_tiny_displacement_counts_like_any_other(size, target):
    """torch's cosine_similarity clamps norms at 1e-8, and would give a half."""
    alpha, new = blend(torch.tensor([size, size]), torch.tensor([3 * size, 3 * size]), torch.zeros(2), target)
    assert alpha == pytest.approx(1, abs=1e-15)
    assert torch.allclose(new, torch.full((2,), 3 * size), rtol=1e-6, atol=0)


def test_one_element_has_three_alphas(target):
    one = torch.ones(1)
    assert [blend(one, last * one, 0 * one, target)[0] for last in (2, -2, 0)] == [1, 0, 0.5]


def test_scopes_of_alpha(target):
    """Two tensors that agree and one that does not; a scope without tensors keeps what it had."""
    phase = phase_of("blend/adaptive", [(2, F32)] * 3, scopes=[0, 0, 2])
    phase.slow = [torch.zeros(2) for _ in range(3)]
    phase.first = [torch.tensor([1.0, 0]), torch.tensor([0.0, 1]), torch.tensor([1.0, 0])]
    phase.source = [torch.tensor([2.0, 0]), torch.tensor([0.0, 2]), torch.tensor([0.0, 2])]
    kept = float(phase.shared[1, 0])
    phase = on(phase, target.device)
    run(phase, target)
    assert phase.shared.flatten().tolist() == [pytest.approx(1), kept, 0.5]
    close(phase.params[2], torch.tensor([0.0, 1]), SUMS)


# Edges


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
def test_the_ends_of_a_fixed_alpha_are_exact(alpha, target):
    """alpha 0 gives s, 1 gives f, and nothing moves where f = s, bit for bit."""
    phase = phase_of("blend", [(100, F32), (100, F32)], {"alpha": alpha})
    phase.source[1] = phase.slow[1].clone()
    phase = on(phase, target.device)
    run(phase, target)
    if alpha in (0.0, 1.0):
        assert same_bits(phase.params[:1], [(phase.source if alpha else phase.slow)[0]])
    assert same_bits(phase.params[1:], phase.slow[1:])


def test_the_first_step_of_a_momentum_takes_the_gradient_undamped(target):
    phase = phase_of("descent/sgd_momentum", [(9, F64)], {"weight_decay": 0.0}, steps=torch.zeros(1))
    phase = on(phase, target.device)
    run(phase, target)
    assert same_bits(phase.states[0], phase.grads)


def test_a_zero_gradient_does_not_move(target):
    """0 / 1e-16 is 0."""
    phase = phase_of("ascent/asam", [(9, F32), (8, BF16)])
    phase.grads = [torch.zeros_like(g) for g in phase.grads]
    phase = on(phase, target.device)
    before = on(phase, target.device)
    run(phase, target)
    assert same_bits(phase.perturbed, before.perturbed)
    assert phase.status.tolist()[::2] == [5, 0]


def test_asam_leaves_other_tensors_as_plain_sam_would(target):
    """With no tensor scaled the pass is plain SAM, bit for bit; eta and |q| do not enter."""
    asam = phase_of("ascent/asam", [(9, F32), (8, BF16)], {"eta": 3.0}, scaled=[False, False])
    plain = on(asam, target.device)
    plain.rule = "ascent"
    asam = on(asam, target.device)
    run(asam, target)
    run(plain, target)
    assert same_bits(written(asam), written(plain))


@pytest.mark.parametrize("rule", ["opening_ascent", "descent_ascent/adam", "descent_blend/tam", "blend/adaptive"])
@pytest.mark.parametrize("tensors", [[], [((0, 3), F32)]], ids=["none", "empty"])
def test_nothing_to_do(tensors, rule, target):
    phase = on(phase_of(rule, tensors, shared=torch.full((1, 3 if "tam" in rule else 1), 0.25)), target.device)
    run(phase, target)
    assert phase.status.tolist()[::2] == [5, 0]


def test_one_buffer_may_be_several_lists(target):
    """A descent into the perturbed weights, then a blend of them into the parameters, as the last two of a cycle."""
    phase = phase_of("descent/sgd_momentum", [(300, F32), (40, F64)])
    phase.target = phase.perturbed
    apart = on(phase, target.device)
    apart.target = [torch.zeros_like(t) for t in apart.target]
    phase = on(phase, target.device)
    run(phase, target)
    run(apart, target)
    assert same_bits(phase.params, apart.target)
    last = on(phase_of("blend/adaptive", [(300, F32), (40, F64)]), target.device)
    last.params, last.source, last.slow = phase.params, phase.target, phase.slow
    other = on(last, target.device)
    other.params = [torch.zeros_like(t) for t in other.params]
    run(last, target)
    run(other, target)
    assert same_bits(last.params, other.params)


# The op and its functions


@pytest.mark.parametrize("rule", ["opening_ascent/asam", "descent_ascent/adatam", "blend/adaptive"])
def test_opcheck(rule, compiled_target):
    """opcheck repeats the call, and a table stands for tensors it cannot copy: they are zero, and stay it."""
    phase = phase_of(rule, [((2, 3), F32), (4, BF16)], {"lr": 0.1})
    for t in [*(t for ts in lists_of(phase).values() for t in ts), *phase.grads, *phase.source, *phase.first]:
        t.zero_()
    phase = on(phase, compiled_target.device)
    op = torch.ops.torsion.lookbehind_planned_.default
    arguments, rows = planned(phase, compiled_target.device), phase.shared.shape[0] + 1
    for half, sums in ((0, None), (1, torch.zeros(rows, n_sums(rule), dtype=F64, device=compiled_target.device))):
        assert set(torch.library.opcheck(op, arguments(half, sums)).values()) == {"SUCCESS"}


@each_pass
def test_names_of_columns_and_streams_are_the_compiled_ones(rule):
    assert RULES[rule]["hyper"] == len(columns(rule))
    assert RULES[rule]["streams"] == len(stream_names(rule, base_of(rule)))
    assert RULES[rule]["sums"] == n_sums(rule)


@pytest.mark.skipif(_native.plan is None, reason="the compiled modules are not built")
def test_names_of_the_last_descents_are_the_compiled_ones():
    assert list(CLOSING) == [f"last_descent/{base}" for base in BASES]
    for rule, found in CLOSING.items():
        alone = rule.replace("last_descent", "descent")
        assert found["streams"] == len(stream_names(rule, base_of(alone)))
        assert (found["hyper"], found["sums"]) == (RULES[alone]["hyper"], RULES[alone]["sums"])


GOLDEN = {
    "L1": ({"rho": 0.1}, (0.8515546880808829, 0.004667846843388529)),
    "L2": ({"rho": 0.1, "momentum": 0.9, "weight_decay": 5e-4}, (0.5685419607500825, -1.1853538666977614)),
    "L3": ({"rho": 0.1, "alpha": "adaptive"}, (0.714598048025578, -0.13177810478911228)),
    "L5": ({"rho": 0.5, "eta": 0.01}, (0.7768306426231482, 0.014298366186184635)),
}


@pytest.mark.parametrize("case", GOLDEN)
def test_outer_steps_of_the_documented_functions(case, target):
    """Golden numbers of the authors' classes: L = (x^2 + 10 y^2) / 2 from (1, 1), two inner steps, lr 0.05."""
    numbers, expected = GOLDEN[case]
    optimizer = ByHand(numbers, target)
    for _ in range(3):
        optimizer.outer_step()
    close(optimizer.q[0], torch.tensor(expected, dtype=F64), tolerances.GOLDEN[F64], case)


class ByHand:
    """Lookbehind with k = 2 on SGD from the functions of ``torsion.ops``."""

    def __init__(self, numbers: dict[str, object], target: Target) -> None:
        settings = {"alpha": 0.5, "eta": 0.0, "momentum": 0.0, "weight_decay": 0.0} | numbers
        self.base = "sgd_momentum" if settings["momentum"] else "sgd"
        self.adaptive, self.scaled = settings["alpha"] == "adaptive", [True] if "eta" in numbers else None
        named = {**settings, "lr": 0.05, "alpha": 1.0 if self.adaptive else settings["alpha"]}
        names = torsion.ops.columns(f"descent/{self.base}")
        self.hyper = torch.tensor([[named.get(name, 0.0) for name in names]], dtype=F64)
        self.ascent = {"rho": settings["rho"], "eta": settings["eta"], "scaled": self.scaled, "backend": target.backend}
        self.common = {"scopes": [0], "groups": [0], "backend": target.backend}
        self.q, self.slow, self.fast, self.momentum = (
            [torch.full((2,), x, dtype=F64, device=target.device)] for x in (1.0, 0.0, 0.0, 0.0)
        )
        self.steps, self.status = torch.zeros(1), torch.zeros(4, dtype=torch.int64)
        self.alphas = torch.zeros(1, 1, dtype=F64)
        for name in ("steps", "status", "alphas"):
            setattr(self, name, getattr(self, name).to(target.device))

    @property
    def gradients(self) -> list[Tensor]:
        return [self.q[0] * torch.tensor([1.0, 10.0], dtype=F64, device=self.q[0].device)]

    def outer_step(self) -> None:
        states = [self.momentum] if self.base == "sgd_momentum" else []
        scalars = (None, self.steps, self.status, self.hyper)
        torsion.ops.ascent_(self.q, self.gradients, self.slow, self.status, **self.ascent)
        torsion.ops.descent_ascent_(
            self.base, self.q, self.gradients, states, self.slow, self.fast, self.slow, *scalars, scaled=self.scaled,
            **self.common,
        )  # fmt: skip
        if self.adaptive:
            torsion.ops.descent_(
                self.base, self.q, self.gradients, states, self.fast, self.q, self.slow, *scalars, **self.common
            )
            torsion.ops.blend_(
                self.q, self.q, self.slow, self.fast, self.alphas, self.status, scopes=[0],
                backend=self.common["backend"],
            )  # fmt: skip
            return
        torsion.ops.descent_blend_(
            self.base, self.q, self.gradients, states, self.fast, self.slow, *scalars, **self.common
        )


def test_version_counters_rise(target):
    """Autograd must notice what is written, and only that."""
    optimizer = ByHand({"rho": 0.1, "momentum": 0.9}, target)
    lists = optimizer.q, optimizer.slow, optimizer.fast, optimizer.momentum
    before = [t._version for (t,) in lists]
    gradients = optimizer.gradients
    torsion.ops.ascent_(optimizer.q, gradients, optimizer.slow, optimizer.status, **optimizer.ascent)
    assert [t._version > v for (t,), v in zip(lists, before, strict=True)] == [True, True, False, False]
    assert gradients[0]._version == 0
    optimizer.outer_step()
    assert all(t._version > v for (t,), v in zip(lists, before, strict=True))


def test_a_base_without_a_rule_is_named():
    optimizer = ByHand({"rho": 0.1}, REFERENCE)
    optimizer.base = "rmsprop"
    with pytest.raises(ValueError, match="base='rmsprop' has no fused descent; use one of sgd, sgd_momentum, adam"):
        optimizer.outer_step()


@pytest.mark.parametrize("side", [1.0, -1.0], ids=["along", "against"])
def test_alpha_stays_between_nothing_and_all(side, fast_target):
    """Rounded sums put the cosine of many parallel displacements past 1; alpha is not."""
    torch.manual_seed(0)
    device = fast_target.device
    slows = [torch.zeros(3, dtype=F64, device=device) for _ in range(100)]
    firsts = [torch.randn(3, dtype=F64).to(device) for _ in slows]
    fasts = [3 * side * f for f in firsts]
    unclamped = torch.stack([f @ g / (f @ f).sqrt() / (g @ g).sqrt() for f, g in zip(firsts, fasts, strict=True)])
    assert (unclamped.abs() > 1).any(), "these displacements would show nothing"
    alphas = torch.full((100, 1), -1.0, dtype=F64, device=device)
    status = torch.zeros(4, dtype=torch.int64, device=device)
    params = [s.clone() for s in slows]
    torsion.ops.blend_(
        params, fasts, slows, firsts, alphas, status, scopes=list(range(100)), backend=fast_target.backend
    )
    assert ((alphas >= 0) & (alphas <= 1)).all()
    close(2 * alphas - 1, torch.full_like(alphas, side), tolerances.STATE[F64])
