"""The torch ops: schemas, fakes, opcheck, version counters, the halves of a split step, and what is refused."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from helpers import Call, bits, each_dtype, each_rule, halves, ids, planned, same_bits, table_of
from tolerances import SUMS, close

import torsion
from torsion.ops import _dispatch, _frame, _native
from torsion.ops._rules import RULES, TAM

needs_c = pytest.mark.skipif(_native.C is None, reason=_native.missing.get("_C", ""))
needs_plan = pytest.mark.skipif(_native.plan is None, reason=_native.missing.get("_plan", ""))


def call_of(rule, dtype=torch.float32, device="cpu", **numbers):
    """A step in mid-run over three tensors, none of them zero; the second in channels_last."""
    torch.manual_seed(4)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def tensors(dtype):
        last = torch.rand(2, 3, 4, 5, device=device).to(dtype, memory_format=torch.channels_last)
        return [torch.rand(7, device=device).to(dtype), last, torch.rand((), device=device).to(dtype)]

    states = [tensors(wide) for _ in rule.states]
    call = Call(rule, tensors(dtype), tensors(dtype), states, {"weight_decay": 0.1, **numbers})
    call.shared = torch.tensor([[0.3, 0.2, 0.65], [-0.1, 0.4, 0.45]], device=device)
    call.scopes, call.slots = [1, 0, 1], [0, 3, 1]
    call.steps = torch.tensor([4.0, 1.0, 9.0, 0.0], device=device)
    return call


# opcheck


VARIANTS = {
    "plain": {},
    "scaled": {"grad_scale": 8.0, "found_inf": 0.0, "max_grad_norm": 0.5},
    "found-inf": {"found_inf": 1.0},
    "tensor-lr": {"lr": 0.25},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@each_dtype(torch.float32, torch.bfloat16)
@each_rule
def test_opcheck(rule, dtype, device, variant):
    """Schema against what is written, fake against real, autograd registration, functionalization."""
    _opcheck(rule, dtype, device, VARIANTS[variant])


def _opcheck(rule, dtype, device, options):
    call = call_of(rule, dtype, device, lr=float("nan") if "lr" in options else 0.1)
    if "lr" in options:
        call.lrs = [torch.tensor(options["lr"], device=device)]
    for name in ("grad_scale", "found_inf"):
        if name in options:
            setattr(call, name, torch.tensor(options[name], device=device))
    call.max_grad_norm = options.get("max_grad_norm")
    before = [bits(t) for t in call.written()]
    result = torch.library.opcheck(getattr(torch.ops.torsion, rule.op).default, call.positional())
    assert set(result.values()) == {"SUCCESS"}
    assert all(torch.equal(a, bits(b)) for a, b in zip(before, call.written(), strict=True)), "opcheck works on copies"


@needs_c
@needs_plan
@pytest.mark.parametrize("phase", [0, 1, 2], ids=["whole", "reduce", "update"])
@each_rule
def test_opcheck_of_planned_ops(rule, phase, compiled_target):
    """opcheck repeats the call on copies of its arguments, but a table stands for tensors it cannot copy.

    So they are zero, and stay it: then the cosine is 0 and repeats give the same. On a GPU the table goes along with
    each call, for a copy of a workspace is not where the table was sent.
    """
    call = call_of(rule, device=compiled_target.device, weight_decay=0.0)
    for t in (*call.params, *call.grads, *(t for s in call.states for t in s)):
        t.zero_()
    table = table_of(call)
    sums = None if phase == 0 else torch.zeros(3, 3, dtype=torch.float64, device=compiled_target.device)
    op = getattr(torch.ops.torsion, f"{rule.name}_planned_").default
    arguments = planned(call, table, phase, sums, None)
    assert set(torch.library.opcheck(op, arguments).values()) == {"SUCCESS"}


@each_rule
def test_fake_kernels_touch_nothing(rule):
    """Tensors without memory go through, as in torch.compile and in a planner that allocates nothing."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    call = call_of(rule)
    with FakeTensorMode() as mode:
        lists = [[mode.from_tensor(t) for t in ts] for ts in (call.params, call.grads, *call.states)]
        rest = [mode.from_tensor(t) for t in (call.shared, call.steps, call.status, call.hyper)]
        tail = call.positional()[6 + len(call.states) :]
        assert getattr(torch.ops.torsion, rule.op)(*lists, *rest, *tail) is None


# Schemas


@needs_c
@pytest.mark.parametrize("name", _native._SCHEMAS)
def test_schemas_of_a_build_without_c_are_the_compiled_ones(name):
    compiled = getattr(torch.ops.torsion, name).default._schema
    assert str(torch._C.parse_schema(f"torsion::{name}{_native._SCHEMAS[name]}")) == str(compiled)


@needs_c
@pytest.mark.parametrize(
    "name", [*(n for rule in RULES.values() for n in (rule.op, f"{rule.name}_planned_")), "lookbehind_planned_"]
)
def test_schemas_mark_what_is_written(name):
    """Every tensor an op may write carries its own mark; gradients, numbers and rates carry none."""
    schema = getattr(torch.ops.torsion, name).default._schema
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    scalars = {"shared", "steps", "status"}
    if name.endswith("planned_"):
        assert written == scalars | {"sums", "workspace"}
    else:
        states = {f"{s}s" for s in RULES[name].states}
        assert written == scalars | states | {"params"}
    marks = re.findall(r"\((\w)!\)", str(schema))
    assert len(marks) == len(written)
    assert len(set(marks)) == len(marks), "two arguments that share a mark may share memory"


@needs_plan
@each_rule
def test_sizes_of_rules_agree_with_the_compiled_ones(rule):
    sizes = _native.plan.rules()[rule.name]
    assert sizes["hyper"] == len(rule.hyper)
    assert sizes["streams"] == 2 + len(rule.states)
    assert sizes["shared"] == len(_frame.SHARED)
    assert sizes["sums"] == len(_frame.SUMS)


@needs_plan
def test_rules_are_the_compiled_ones():
    assert set(_native.plan.rules()) == {rule.name for rule in RULES.values()}
    assert _native.plan.CHUNK == 16384  # numerics, not a tuning knob: sums are taken chunk by chunk


# Version counters


@each_rule
def test_version_counters_rise(rule, target):
    """Autograd must notice: every list that is written, and the gradients not."""
    call = call_of(rule, device=target.device)
    before = [t._version for t in call.written()]
    read = [t._version for t in (*call.grads, call.hyper)]
    call.run(target.backend)
    assert all(t._version > v for t, v in zip(call.written(), before, strict=True))
    assert [t._version for t in (*call.grads, call.hyper)] == read


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@each_rule
def test_version_counters_rise_in_the_dispatcher(rule, device):
    """The op called as ``torch.ops.torsion``, past the documented function."""
    call = call_of(rule, device=device)
    before = [t._version for t in call.written()]
    getattr(torch.ops.torsion, rule.op)(*call.positional())
    assert all(t._version > v for t, v in zip(call.written(), before, strict=True))


@pytest.mark.parametrize("cls", [torsion.TAM, torsion.AdaTAM], ids=ids)
def test_backward_through_an_updated_parameter_is_refused(cls, target):
    """What the counters are for: the graph holds the parameter as it was."""
    p = target.parameter([1.0, 2.0])
    optimizer = target.optimizer(cls, [p])
    loss = (p * p).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_state_versions_rise_with_a_step(target):
    p = target.parameter([1.0, 2.0])
    optimizer = target.optimizer(torsion.AdaTAM, [p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    state = optimizer.state[p]
    before = {key: t._version for key, t in state.items()}
    optimizer.step()
    assert all(state[key]._version > before[key] for key in state)


# Functions, dispatcher, and halves of a step


@each_dtype()
@each_rule
def test_the_function_and_the_dispatcher_do_the_same(rule, dtype):
    """torch.ops.torsion runs the best back end of the device."""
    a, b = call_of(rule, dtype), call_of(rule, dtype)
    a.run(_dispatch.BEHIND_OPS["cpu"])
    getattr(torch.ops.torsion, rule.op)(*b.positional())
    assert same_bits(a.written(), b.written())


@each_rule
def test_slots_default_to_the_order_of_the_list(rule, fast_target):
    a, b = call_of(rule, device=fast_target.device), call_of(rule, device=fast_target.device)
    a.slots, b.slots = None, [0, 1, 2]
    a.run(fast_target.backend)
    b.run(fast_target.backend)
    assert same_bits(a.written(), b.written())
    assert a.steps.tolist() == [5, 2, 10, 0]


@each_rule
def test_what_a_step_writes_into_its_scalars(rule, target):
    """``shared``, ``steps`` and ``status`` after one step, from sums in Python."""
    call = call_of(rule, torch.float64, target.device)
    call.shared = call.shared.double()
    call.max_grad_norm = 0.5
    m, g = [[t.cpu().clone() for t in ts] for ts in (call.states[0], call.grads)]
    before = call.shared.cpu().clone()
    call.run(target.backend)
    expected = before.clone()
    for scope in (0, 1):
        members = [i for i in range(3) if call.scopes[i] == scope]
        dot, gg, mm = (sum(float((x[i] * y[i]).sum()) for i in members) for x, y in ((m, g), (g, g), (m, m)))
        s = dot / (gg**0.5 * mm**0.5)
        correlation = 0.9 * float(before[scope, 0]) + (1 - 0.9) * s
        expected[scope] = torch.tensor([correlation, s, (1 + correlation) / 2], dtype=torch.float64)
    close(call.shared, expected, SUMS)
    assert call.steps.tolist() == [5, 2, 9, 1]
    norm = sum(float((t * t).sum()) for t in g) ** 0.5
    skipped, _, skip, _ = call.status.tolist()
    assert (skipped, skip) == (0, 0)
    doubles = call.status.cpu().view(torch.float64)
    assert doubles[1].item() == pytest.approx(norm, rel=1e-14)
    assert doubles[3].item() == pytest.approx(0.5 / (norm + 1e-6), rel=1e-14)


def test_a_seeding_step_forgets_what_the_momentum_held(target):
    """clone at step 0: m = g + weight_decay theta, whatever lay there before, and outside the cosine."""
    call = call_of(TAM, torch.float64, target.device, clone=1.0, weight_decay=0.5)
    call.steps.zero_()
    before = [(p.cpu().clone(), g.cpu().clone()) for p, g in zip(call.params, call.grads, strict=True)]
    call.run(target.backend)
    for m, (p, g) in zip(call.states[0], before, strict=True):
        close(m, g + 0.5 * p, SUMS)
    assert call.shared[:, 1].tolist() == [0, 0]


@each_rule
def test_halves_of_a_step_make_the_whole(rule, target):
    """reduce, then apply_, bit for bit as in one go; the first half writes nothing but its sums."""
    whole, split = call_of(rule, device=target.device), call_of(rule, device=target.device)
    whole_before = whole.copy()
    whole.run(target.backend)
    before = [bits(t) for t in split.written()]
    m, g = [[t.cpu().double() for t in ts] for ts in (whole_before.states[0], whole_before.grads)]
    sums, rest = halves(split, target)
    assert all(torch.equal(a, bits(b)) for a, b in zip(before, split.written(), strict=True))
    rest()
    assert same_bits(split.written(), whole.written())
    rows = [[1], [0, 2], [0, 1, 2]]
    pairs = ((m, g), (g, g), (m, m))
    expected = [[sum(float((x[i] * y[i]).sum()) for i in row) for x, y in pairs] for row in rows]
    close(sums, torch.tensor(expected, dtype=torch.float64), SUMS)


@each_rule
def test_weights_say_what_part_of_the_sums_is_this_process_own(rule, target):
    """Two ranks that hold the same tensor and half of another: their sums add up to those of the whole."""
    call, weighted = call_of(rule, device=target.device), call_of(rule, device=target.device)
    whole, _ = halves(call, target)
    parts = [halves(weighted, target, weights=weights)[0] for weights in ([0.5, 0.25, 1.0], [0.5, 0.75, 0.0])]
    close(parts[0] + parts[1], whole, SUMS)


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # interpreted: no clip is infinity / NaN
@each_rule
def test_the_second_half_believes_the_sums_it_is_given(rule, target):
    """Another rank's non-finite gradient skips here too; its finite sums turn the cosine here."""
    call = call_of(rule, device=target.device)
    before = [bits(t) for t in call.written()[:-1]]
    sums, rest = halves(call, target)
    good = sums.clone()
    sums[-1, 0] = torch.nan
    rest()
    assert all(torch.equal(a, bits(b)) for a, b in zip(before, call.written()[:-1], strict=True))
    assert call.status[0].item() == 1
    sums.copy_(good)
    sums[0] = torch.tensor([-6.0, 4.0, 9.0])
    rest()
    assert call.shared[0, 1].item() == -1
    assert call.status[0].item() == 1


# What is refused


def _shorter(call):
    call.grads = call.grads[:-1]


def _other_dtype(call):
    call.states[0][0] = call.states[0][0].to(torch.bfloat16)


def _gradient_dtype(call):
    call.grads[2] = call.grads[2].double()


def _other_sizes(call):
    call.grads[0] = call.grads[0].new_zeros(8)


def _other_strides(call):
    call.grads[1] = call.grads[1].contiguous()


def _holes(call):
    call.params[0] = call.params[0].new_zeros(14)[::2]
    call.grads[0] = call.params[0].new_zeros(14)[::2]


def _overlap(call):
    call.params[0] = call.params[0].new_zeros(1).expand(7)


def _integers(call):
    call.params[0], call.grads[0] = call.params[0].int(), call.grads[0].int()


def _scope_outside(call):
    call.scopes = [0, 2, 0]


def _group_outside(call):
    call.groups = [0, 0, 1]


def _scope_missing(call):
    call.scopes = [0, 0]


def _slot_outside(call):
    call.slots = [0, 1, 4]


def _slot_negative(call):
    call.slots = [0, -1, 2]


def _rate_missing(call):
    call.hyper[0, 0] = torch.nan


MISFITS = {
    _shorter: r"lists differ in length",
    _other_dtype: r"list 2, tensor 0 .*(dtype|float32)",
    _gradient_dtype: r"list 1, tensor 2 .*(dtype|float32)",
    _other_sizes: r"list 1, tensor 0 differs from its parameter in sizes or strides",
    _other_strides: r"list 1, tensor 1 differs from its parameter in sizes or strides",
    _holes: r"params\[0\] has holes or overlaps in memory; pass a contiguous copy",
    _overlap: r"params\[0\] has holes or overlaps in memory; pass a contiguous copy",
    _integers: r"params\[0\] must be float32, float64, bfloat16 or float16",
    _scope_outside: r"scopes\[1\] = 2 is out",
    _group_outside: r"groups\[2\] = 1 is out",
    _scope_missing: r"(scopes.* need.* one entry per tensor|lists differ in length)",
    _slot_outside: r"(slots\[2\] = 4 is out|steps must be contiguous with at least 5 elements)",
    _slot_negative: r"slots\[1\].* (is negative|is out)",
    _rate_missing: r"hyper asks for .*learning rates.* lrs holds \(?0",
}


@pytest.mark.parametrize("spoil", MISFITS, ids=lambda f: f.__name__[1:].replace("_", "-"))
def test_misfits_are_named_before_anything_is_written(spoil, target):
    """By list and position, on every back end alike."""
    call = call_of(TAM, device=target.device)
    spoil(call)
    before = [bits(t) for t in call.written()]
    with pytest.raises(RuntimeError, match=MISFITS[spoil]):
        call.run(target.backend)
    assert all(torch.equal(a, bits(b)) for a, b in zip(before, call.written(), strict=True))


@needs_c
@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("shared", torch.zeros(2, 3, dtype=torch.float16), "shared has the wrong dtype"),
        ("steps", torch.zeros(4, dtype=torch.float64), "steps has the wrong dtype"),
        ("status", torch.zeros(4), "status has the wrong dtype"),
        ("status", torch.zeros(3, dtype=torch.int64), "status must be contiguous with at least 4 elements, has 3"),
        ("hyper", torch.zeros(1, 10), "hyper must be a contiguous float64 CPU tensor"),
        ("grad_scale", torch.ones(2), "grad_scale must be one float32 number"),
        ("found_inf", torch.ones((), dtype=torch.float64), "found_inf must be one float32 number"),
    ],
)  # fmt: skip
def test_scalars_of_the_wrong_kind_are_named(name, value, message):
    call = call_of(TAM)
    setattr(call, name, value)
    before = [bits(t) for t in call.written()]
    with pytest.raises(RuntimeError, match=message):
        call.run("cpu")
    assert all(torch.equal(a, bits(b)) for a, b in zip(before, call.written(), strict=True))


@needs_c
@pytest.mark.parametrize(
    ("rate", "message"),
    [(torch.zeros(2), "must be one number, has 2"), (torch.tensor(1), "must be float32 or float64")],
    ids=["two-numbers", "integer"],
)
def test_rates_of_the_wrong_kind_are_named(rate, message):
    call = call_of(TAM, lr=float("nan"))
    call.lrs = [rate]
    with pytest.raises(RuntimeError, match=message):
        call.run("cpu")


def test_copies_of_a_call_are_independent():
    """The tests above compare a call with its copy."""
    call = call_of(TAM)
    other = copy.deepcopy(call)
    other.run("reference")
    assert not same_bits(call.params, other.params)
