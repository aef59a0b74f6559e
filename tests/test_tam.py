"""TAM against the float64 judge: back ends, dtypes, layouts, scopes and every option; and what the method promises."""

from __future__ import annotations

import pytest
import torch
from helpers import HOLE, LOW, Duel, each_dtype, ids, lay, randoms, shapes_of, two_groups
from tolerances import NORM, STATE, close

import torsion

SECOND = {"lr": 0.02, "momentum": 0.5, "weight_decay": 0.3}
OPTIONS = {
    "defaults": {},
    "coupled-decay": {"weight_decay": 0.1},
    "decoupled-decay": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "maximize": {"maximize": True},
    "maximize-coupled-decay": {"maximize": True, "weight_decay": 0.1},
    "clipped": {"max_grad_norm": 0.5},
    "clip-out-of-reach": {"max_grad_norm": 1e4},
    "no-momentum": {"momentum": 0.0},
    "unsmoothed": {"decay": 0.0},
    "damping-stays": {"decay": 1.0},
    "floor": {"eps_damping": 0.25},
    "clone-clipped-decayed": {"init": "clone", "max_grad_norm": 0.5, "weight_decay": 0.1},
    "clone-decoupled": {"init": "clone", "weight_decay": 0.1, "decoupled_weight_decay": True},
}
LAYOUTS = [  # parameter, gradient
    ("contiguous", "contiguous"),
    ("channels_last", "channels_last"),
    ("transposed", "transposed"),
    ("every_second", "contiguous"),
    ("misaligned", "misaligned"),
    ("channels_last", "contiguous"),
    ("contiguous", "transposed"),
    ("contiguous", "every_second"),
    ("every_second", "every_second"),
    ("transposed", "misaligned"),
]


def duel(target, dtype, steps=5, second=SECOND, **keywords):
    groups = two_groups(target, dtype, **second)
    contest = Duel(target, torsion.TAM, groups, {"lr": 0.1, **keywords}, dtype)
    for _ in range(steps):
        contest.step(randoms(shapes_of(groups)))
    return contest


@pytest.mark.parametrize("init", ["zero", "clone"])
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@each_dtype()
def test_follows_the_judge(dtype, scope, init, fast_target):
    duel(fast_target, dtype, scope=scope, init=init)


@each_dtype()
def test_follows_the_judge_on_every_back_end(dtype, target):
    duel(target, dtype, steps=3, scope="group", init="clone", weight_decay=0.1, max_grad_norm=0.5)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=ids)
def test_option(dtype, name, fast_target):
    duel(fast_target, dtype, second={"lr": 0.02}, **OPTIONS[name])


@each_dtype(*LOW)
def test_stochastic_rounding_stays_between_neighbours(dtype, target):
    duel(target, dtype, steps=3, stochastic_rounding=True)


@pytest.mark.parametrize(("layout", "grad_layout"), LAYOUTS, ids=lambda x: x)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_layout(dtype, layout, grad_layout, fast_target):
    _with_layouts(fast_target, dtype, layout, grad_layout)


@pytest.mark.parametrize(("layout", "grad_layout"), [LAYOUTS[1], LAYOUTS[3], LAYOUTS[4], LAYOUTS[5]], ids=lambda x: x)
def test_layout_on_every_back_end(layout, grad_layout, target):
    _with_layouts(target, torch.float32, layout, grad_layout, steps=2)


def _with_layouts(target, dtype, layout, grad_layout, steps=3):
    """Decay ties gradients to parameters and two steps tie state to both: any two that are out of step show."""
    params = [target.parameter(t, dtype, layout) for t in randoms([(3, 4, 5, 6), (2, 7, 1, 5)])]
    strides = [p.stride() for p in params]
    contest = Duel(
        target, torsion.TAM, [{"params": params}], {"lr": 0.1, "weight_decay": 0.3}, dtype, grad_layout=grad_layout
    )
    for _ in range(steps):
        contest.step(randoms([tuple(p.shape) for p in params]))
    assert [p.stride() for p in params] == strides
    if layout == "every_second":
        for p in params:
            holes = p.detach().as_strided((p.numel(),), (2,), 1)[: p.numel() - 1]
            assert (holes == HOLE).all(), "the elements between those of a view were written to"


def test_expanded_gradient(target):
    """The gradient of a sum is one number that looks like many."""
    p = target.parameter(randoms([(3, 4)])[0])
    contest = Duel(target, torsion.TAM, [{"params": [p]}], {"lr": 0.1}, grad_layout="expanded")
    for value in (0.5, -2.0):
        contest.step([torch.full((3, 4), value)])
    assert p.grad.stride() == (0, 0)


def test_odd_strides_of_dimensions_of_size_one(fast_target):
    """torch gives such dimensions any stride; none of them says where an element lies."""
    p = torch.nn.Parameter(
        torch.randn(6, dtype=torch.float64, device=fast_target.device).as_strided((1, 6, 1), (99, 1, 5))
    )
    contest = Duel(fast_target, torsion.TAM, [{"params": [p]}], {"lr": 0.1, "weight_decay": 0.1})
    for _ in range(3):
        contest.step(randoms([(1, 6, 1)]))


def test_layouts_may_change_between_steps(fast_target):
    """A gradient that comes in another layout at the next step is noticed."""
    params = [fast_target.parameter(t) for t in randoms([(3, 4, 5, 6)])]
    contest = Duel(fast_target, torsion.TAM, [{"params": params}], {"lr": 0.1, "weight_decay": 0.3})
    layouts = ["contiguous", "channels_last", "contiguous", "every_second", "misaligned", "contiguous"]
    for contest.grad_layout in layouts:
        contest.step(randoms([(3, 4, 5, 6)]))


def test_parameter_data_replaced_between_steps(fast_target):
    """As ``module.to(memory_format=...)`` does: same parameter object, other memory."""
    p = fast_target.parameter(randoms([(3, 4, 5, 6)])[0])
    contest = Duel(fast_target, torsion.TAM, [{"params": [p]}], {"lr": 0.1, "weight_decay": 0.3})
    for layout in ("contiguous", "channels_last", "transposed", "contiguous"):
        p.data = lay(p.data, layout)
        contest.step(randoms([(3, 4, 5, 6)]))
        contest.step(randoms([(3, 4, 5, 6)]))


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_dtypes_mixed_in_one_step(scope, target):
    """float64, float32, bfloat16 and float16 parameters share one cosine and one clip factor."""
    shapes = [(5,), (3, 3), (9,), (2, 4), (7,)]
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.float64, torch.bfloat16]
    params = [target.parameter(t, d) for t, d in zip(randoms(shapes), dtypes, strict=True)]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]
    contest = Duel(target, torsion.TAM, groups, {"lr": 0.1, "scope": scope, "max_grad_norm": 1.0}, torch.float32)
    for _ in range(2 if target.interpreted else 4):
        contest.step(randoms(shapes))


@each_dtype()
def test_state_is_float32_or_float64_and_laid_out_as_its_parameter(dtype, target):
    p = target.parameter(randoms([(2, 3, 4, 5)])[0], dtype, "channels_last")
    p.grad = torch.ones_like(p)
    optimizer = target.optimizer(torsion.TAM, [p])
    optimizer.step()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = optimizer.state[p]
    assert list(state) == ["step", "momentum_buffer", "correlation"]
    assert state["momentum_buffer"].dtype == wide
    assert state["momentum_buffer"].stride() == p.stride()
    assert state["correlation"].dtype == wide
    assert state["step"].shape == state["correlation"].shape == ()
    assert all(t.device == p.device for t in state.values())


@each_dtype(*LOW)
def test_float32_state_keeps_what_the_parameter_cannot(dtype, fast_target):
    """Gradients of 2^-12 are below the last place of a parameter near 1 in 8 or 11 bits; the momentum adds them up."""
    p = fast_target.parameter(torch.ones(64), dtype)
    optimizer = fast_target.optimizer(torsion.TAM, [p], lr=1e-3, momentum=0.9)
    expected = 0.0
    for t in range(8):
        p.grad = torch.full_like(p, 2.0**-12)
        optimizer.step()
        correlation = 1 - 0.9**t
        expected = 0.9 * expected + (1e-8 + (1 + correlation) / 2) * 2.0**-12
    close(optimizer.state[p]["momentum_buffer"], torch.full((64,), expected), STATE[dtype])


def test_parameter_turned_in_place_between_steps(target):
    """A square matrix set to its own transpose: same object, sizes and address, other strides."""
    p = target.parameter(randoms([(4, 4)])[0])
    contest = Duel(target, torsion.TAM, [{"params": [p]}], {"lr": 0.1, "weight_decay": 0.3})
    for _ in range(2):
        contest.step(randoms([(4, 4)]))
        p.data = p.data.t()
        contest.judge.cells[0].theta = contest.judge.cells[0].theta.t()


def test_learning_rate_changes_between_steps(target):
    p = target.parameter(randoms([(7,)])[0])
    contest = Duel(target, torsion.TAM, [{"params": [p]}], {"lr": 0.1, "weight_decay": 0.1})
    for lr in (0.1, 0.0, 0.03):
        contest.optimizer.param_groups[0]["lr"] = contest.judge.cells[0].settings["lr"] = lr
        contest.step(randoms([(7,)]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=ids)
@pytest.mark.parametrize("where", ["cpu", "device"])
def test_learning_rate_in_a_tensor(where, dtype, target):
    """Read at each step, in place changes included; a group with a plain number stands beside it."""
    rate = torch.tensor(0.125, dtype=dtype, device=target.device if where == "device" else "cpu")
    params = [target.parameter(t) for t in randoms([(7,), (3, 2), (4,)])]
    groups = [{"params": params[:1], "lr": 0.5}, {"params": params[1:2]}, {"params": params[2:], "lr": rate * 2}]
    contest = Duel(target, torsion.TAM, groups, {"lr": rate, "weight_decay": 0.1, "decoupled_weight_decay": True})
    for value in (0.125, 0.25):
        rate.fill_(value)
        contest.judge.cells[1].settings["lr"] = value
        contest.step(randoms([(7,), (3, 2), (4,)]))


def test_any_group_value_may_change_between_steps(fast_target):
    """Schedules of momentum and decay write into the groups, as they do with torch's optimizers."""
    p = fast_target.parameter(randoms([(7,)])[0])
    contest = Duel(fast_target, torsion.TAM, [{"params": [p]}], {"lr": 0.1, "max_grad_norm": 1e3})
    changes = [{"momentum": 0.5}, {"weight_decay": 0.2}, {"decay": 0.1}, {"maximize": True}, {"eps_damping": 0.5}]
    for change in changes:
        contest.optimizer.param_groups[0].update(change)
        contest.judge.cells[0].settings.update(change)
        contest.step(randoms([(7,)]))
    contest.optimizer.param_groups[0]["max_grad_norm"] = contest.judge.max_grad_norm = 0.1
    contest.step(randoms([(7,)]))


def test_clipping_is_that_of_clip_grad_norm(target):
    """max_grad_norm in the step, against torch's clip before it; the gradient itself stays as it was."""
    start, grads = randoms([(6, 5), (9,)]), randoms([(6, 5), (9,)])
    params = [[target.parameter(t) for t in start] for _ in range(2)]
    folded = target.optimizer(torsion.TAM, params[0], lr=0.1, weight_decay=0.1, max_grad_norm=0.7)
    plain = target.optimizer(torsion.TAM, params[1], lr=0.1, weight_decay=0.1)
    for _ in range(2):
        for ps in params:
            for p, g in zip(ps, grads, strict=True):
                p.grad = g.to(p.device).clone()
        norm = torch.nn.utils.clip_grad_norm_(params[1], 0.7)
        folded.step()
        plain.step()
        close(folded.grad_norm(), norm, NORM)
        for p, q, g in zip(*params, grads, strict=True):
            close(p, q, STATE[torch.float64])
            assert torch.equal(p.grad.cpu(), g)


@pytest.mark.parametrize("scale", [1024.0, 1000.0])
@each_dtype()
def test_scaled_gradients_with_folded_unscale_equal_unscaled_ones(dtype, scale, target):
    """As GradScaler hands its scale over; coupled decay, clip and cosine must not see it."""
    shapes = [(6, 5), (9,)]
    params = [target.parameter(t, dtype) for t in randoms(shapes)]
    keywords = {"lr": 0.1, "weight_decay": 0.1, "max_grad_norm": 0.7}
    contest = Duel(target, torsion.TAM, [{"params": params}], keywords, dtype)
    contest.optimizer.grad_scale = torch.tensor(scale, device=target.device)
    contest.optimizer.found_inf = torch.tensor(0.0, device=target.device)
    for _ in range(2):
        contest.step(randoms(shapes, scale=scale), scale=scale)


@pytest.mark.filterwarnings("ignore:invalid value encountered in divide")  # interpreted: no clip is infinity / infinity
def test_found_inf_skips(target):
    p = target.parameter([1.0, 2.0])
    contest = Duel(target, torsion.TAM, [{"params": [p]}], {"lr": 0.1})
    contest.step([torch.tensor([0.5, 0.25])])
    contest.optimizer.found_inf = torch.ones((), device=target.device)
    contest.step([torch.tensor([0.5, 0.25])], found_inf=True)
    contest.optimizer.found_inf.zero_()
    contest.step([torch.tensor([0.5, -0.25])])
    assert contest.judge.skipped == 1


# What the method promises


def _after(target, gradients, **keywords):
    p = target.parameter(torch.zeros(2))
    optimizer = target.optimizer(torsion.TAM, [p], lr=1.0, momentum=0.9, eps_damping=0.0, **keywords)
    for g in gradients:
        p.grad = torch.tensor(g, dtype=torch.float64, device=p.device)
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize(
    ("second", "damping"),
    [((6.0, 8.0), 1.0), ((-4.0, 3.0), 0.5), ((-0.3, -0.4), 0.0)],
    ids=["aligned", "orthogonal", "opposed"],
)
def test_damping_is_one_aligned_half_orthogonal_zero_opposed(second, damping, target):
    p, optimizer = _after(target, [(3.0, 4.0), second], decay=0.0)
    assert optimizer.damping()["global"].item() == pytest.approx(damping, abs=1e-15)
    # m_1 = 1/2 g_1, then m_2 = 0.9 m_1 + damping g_2
    expected = [0.45 * a + damping * b for a, b in zip((3.0, 4.0), second, strict=True)]
    assert optimizer.state[p]["momentum_buffer"].tolist() == pytest.approx(expected, abs=1e-15)


def test_t11_sgd_at_half_rate_when_the_damping_stays(target):
    """decay=1 and eps_damping=0 keep d at 1/2: torch.optim.SGD at lr / 2, decay and all."""
    start = randoms([(6, 5), (9,)])
    ours, theirs = ([target.parameter(t) for t in start] for _ in range(2))
    settings = {"momentum": 0.9}
    tam = target.optimizer(torsion.TAM, ours, lr=0.1, weight_decay=0.02, decay=1.0, eps_damping=0.0, **settings)
    # The decay term is damped along with the gradient, so both halves of h are at half strength.
    sgd = torch.optim.SGD(theirs, lr=0.05, weight_decay=0.02, **settings)
    for _ in range(3):
        for p, q, g in zip(ours, theirs, randoms([(6, 5), (9,)]), strict=True):
            p.grad, q.grad = g.to(p.device), g.to(p.device)
        tam.step()
        sgd.step()
        for p, q in zip(ours, theirs, strict=True):
            close(p, q, STATE[torch.float64])


def test_trains_a_regression(fast_target):
    """A well conditioned least squares problem of 20 unknowns is solved in 100 steps."""
    x, w = torch.randn(100, 20, dtype=torch.float64), torch.randn(20, 1, dtype=torch.float64)
    x, w = x.to(fast_target.device), w.to(fast_target.device)
    p = fast_target.parameter(torch.zeros(20, 1))
    optimizer = fast_target.optimizer(torsion.TAM, [p], lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = ((x @ p - x @ w) ** 2).mean()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(100)]
    assert losses[-1] < 1e-3 * losses[0]


def test_closure_runs_once_with_gradients_and_before_the_step(target):
    p = target.parameter([1.0])
    optimizer = target.optimizer(torsion.TAM, [p], lr=0.1)
    calls = []

    def closure():
        calls.append(torch.is_grad_enabled())
        p.grad = torch.full_like(p, 2.0)
        return "the loss"

    with torch.no_grad():
        assert optimizer.step(closure) == "the loss"
    assert calls == [True]
    assert p.item() == pytest.approx(1 - 0.1 * (0.5 + 1e-8) * 2, rel=1e-14)


def test_reports_before_the_first_step(target):
    optimizer = target.optimizer(torsion.TAM, [target.parameter([1.0])])
    assert optimizer.cosine() == optimizer.damping() == {}
    assert optimizer.grad_norm().item() == 0
    assert optimizer.skipped_steps().item() == 0


@pytest.mark.parametrize(
    ("scope", "keys"),
    [("global", ["global"]), ("group", [0, 1]), ("tensor", ["w.a", "w.b", "w.c"])],
    ids=["global", "group", "tensor"],
)
def test_reports_are_keyed_by_scope(scope, keys, fast_target):
    a, b, c = (fast_target.parameter([1.0, 2.0]) for _ in range(3))
    groups = [{"params": [("w.a", a), ("w.b", b)]}, {"params": [("w.c", c)]}]
    optimizer = fast_target.optimizer(torsion.TAM, groups, scope=scope)
    for p in (a, b, c):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert list(optimizer.cosine()) == list(optimizer.damping()) == keys
    for t in (*optimizer.cosine().values(), *optimizer.damping().values(), optimizer.grad_norm()):
        assert t.shape == ()
        assert t.device == a.device


def test_reports_are_copies(target):
    """What a caller does with a report does not reach the optimizer."""
    p = target.parameter([1.0, 2.0])
    optimizer = target.optimizer(torsion.TAM, [p])
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()

    def reports():
        return [
            optimizer.cosine()["global"],
            optimizer.damping()["global"],
            optimizer.grad_norm(),
            optimizer.skipped_steps(),
        ]

    before = [t.item() for t in reports()]
    for t in reports():
        t.fill_(9)
    assert [t.item() for t in reports()] == before
    assert optimizer.state[p]["correlation"].item() == pytest.approx(0.1)
