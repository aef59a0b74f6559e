"""AdaTAM and AdaTAMW against the float64 judge: back ends, dtypes, layouts, scopes, options; and what they promise.

What they share with TAM through one engine (rates in tensors, reports, changes between steps) is in test_tam.py.
"""

from __future__ import annotations

import pytest
import torch
from helpers import LOW, Duel, each_dtype, ids, randoms, shapes_of, two_groups
from tolerances import NORM, STATE, close

import torsion

ADAPTIVE = pytest.mark.parametrize("cls", [torsion.AdaTAM, torsion.AdaTAMW], ids=ids)
SECOND = {"lr": 2e-3, "betas": (0.8, 0.99), "eps": 1e-3, "weight_decay": 0.3}
OPTIONS = {
    "defaults": {},
    "decay": {"weight_decay": 0.1},
    "no-decay": {"weight_decay": 0.0},
    "bias-correction": {"bias_correction": True},
    "bias-correction-beta2-0": {"bias_correction": True, "betas": (0.9, 0.0)},
    "maximize-decay": {"maximize": True, "weight_decay": 0.1},
    "clipped": {"max_grad_norm": 0.5},
    # A small eps lets the decay, which v does not see, throw float16 parameters beyond their range.
    "clipped-decay": {"max_grad_norm": 0.5, "weight_decay": 0.1, "eps": 1e-3},
    "no-momentum": {"betas": (0.0, 0.999)},
    "unsmoothed": {"decay": 0.0},
    "damping-stays": {"decay": 1.0},
    "floor": {"eps_damping": 0.25},
    "large-eps": {"eps": 0.5},
}


def duel(target, cls, dtype, steps=5, second=SECOND, **keywords):
    groups = two_groups(target, dtype, **second)
    contest = Duel(target, cls, groups, {"lr": 0.01, **keywords}, dtype)
    for _ in range(steps):
        contest.step(randoms(shapes_of(groups)))
    return contest


@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@each_dtype()
@ADAPTIVE
def test_follows_the_judge(cls, dtype, scope, fast_target):
    duel(fast_target, cls, dtype, scope=scope)


@each_dtype()
@ADAPTIVE
def test_follows_the_judge_on_every_back_end(cls, dtype, target):
    duel(target, cls, dtype, steps=3, scope="group", bias_correction=True, max_grad_norm=0.5)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=ids)
@ADAPTIVE
def test_option(cls, dtype, name, fast_target):
    duel(fast_target, cls, dtype, second={"lr": 2e-3}, **OPTIONS[name])


@each_dtype(*LOW)
def test_stochastic_rounding_stays_between_neighbours(dtype, target):
    duel(target, torsion.AdaTAMW, dtype, steps=2, stochastic_rounding=True)


@pytest.mark.parametrize(
    ("layout", "grad_layout"),
    [
        ("channels_last", "channels_last"),
        ("every_second", "contiguous"),
        ("misaligned", "misaligned"),
        ("transposed", "contiguous"),
    ],
    ids=lambda x: x,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=ids)
def test_layout(dtype, layout, grad_layout, fast_target):
    params = [fast_target.parameter(t, dtype, layout) for t in randoms([(3, 4, 5, 6), (2, 7, 1, 5)])]
    keywords = {"lr": 0.01, "weight_decay": 0.3}
    contest = Duel(fast_target, torsion.AdaTAM, [{"params": params}], keywords, dtype, grad_layout=grad_layout)
    for _ in range(3):
        contest.step(randoms([tuple(p.shape) for p in params]))


@pytest.mark.parametrize("scope", ["global", "group"])
def test_dtypes_mixed_in_one_step(scope, target):
    """float64, float32, bfloat16 and float16 parameters share one cosine."""
    shapes = [(5,), (3, 3), (9,), (2, 4)]
    dtypes = [torch.bfloat16, torch.float32, torch.float16, torch.float64]
    params = [target.parameter(t, d) for t, d in zip(randoms(shapes), dtypes, strict=True)]
    groups = [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.1}]
    contest = Duel(target, torsion.AdaTAM, groups, {"lr": 0.01, "scope": scope}, torch.float32)
    for _ in range(2 if target.interpreted else 4):
        contest.step(randoms(shapes))


@each_dtype()
@ADAPTIVE
def test_state_is_float32_or_float64_and_laid_out_as_its_parameter(cls, dtype, target):
    p = target.parameter(randoms([(2, 3, 4, 5)])[0], dtype, "channels_last")
    p.grad = torch.ones_like(p)
    optimizer = target.optimizer(cls, [p])
    optimizer.step()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    state = optimizer.state[p]
    assert list(state) == ["step", "exp_avg", "exp_avg_sq", "correlation"]
    for key in ("exp_avg", "exp_avg_sq"):
        assert state[key].dtype == wide
        assert state[key].stride() == p.stride()
    assert state["correlation"].dtype == wide


@each_dtype(*LOW)
def test_second_moment_of_low_precision_parameters_decays(dtype, fast_target):
    """1 * 0.999 is 1 in 8 or 11 bits, for ever; in float32 a hundred steps without a gradient leave 0.999^100."""
    p = fast_target.parameter(torch.zeros(4), dtype)
    optimizer = fast_target.optimizer(torsion.AdaTAM, [p], lr=0.0, betas=(0.9, 0.999))
    p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.state[p]["exp_avg_sq"].fill_(1.0)
    for _ in range(100):
        optimizer.step()
    close(optimizer.state[p]["exp_avg_sq"], torch.full((4,), 0.999**100), STATE[torch.float32])


def test_bias_correction_counts_each_tensors_own_steps(target):
    """A tensor whose gradient comes at the second step is corrected as at its first."""
    params = [target.parameter(t) for t in randoms([(5,), (4,)])]
    contest = Duel(target, torsion.AdaTAM, [{"params": params}], {"lr": 0.01, "bias_correction": True})
    a, b = randoms([(5,), (4,)])
    for grads in ([a, None], [a, b], [None, b], [a, b]):
        contest.step(grads)
    assert [cell.t for cell in contest.judge.cells] == [3, 3]


def test_learning_rate_in_a_tensor(target):
    rate = torch.tensor(0.125)
    params = [target.parameter(t) for t in randoms([(7,), (3, 2)])]
    groups = [{"params": params[:1], "lr": 0.5}, {"params": params[1:]}]
    contest = Duel(target, torsion.AdaTAMW, groups, {"lr": rate})
    for value in (0.125, 0.25):
        rate.fill_(value)
        contest.judge.cells[1].settings["lr"] = value
        contest.step(randoms([(7,), (3, 2)]))


@ADAPTIVE
def test_clipping_is_that_of_clip_grad_norm(cls, fast_target):
    """v takes the clipped gradient too, as Adam's would after clip_grad_norm_."""
    start, grads = randoms([(6, 5), (9,)]), randoms([(6, 5), (9,)])
    params = [[fast_target.parameter(t) for t in start] for _ in range(2)]
    folded = fast_target.optimizer(cls, params[0], lr=0.01, weight_decay=0.1, max_grad_norm=0.7)
    plain = fast_target.optimizer(cls, params[1], lr=0.01, weight_decay=0.1)
    for _ in range(3):
        for ps in params:
            for p, g in zip(ps, grads, strict=True):
                p.grad = g.to(p.device).clone()
        norm = torch.nn.utils.clip_grad_norm_(params[1], 0.7)
        folded.step()
        plain.step()
        close(folded.grad_norm(), norm, NORM)
        for p, q in zip(*params, strict=True):
            close(p, q, STATE[torch.float64])
            close(folded.state[p]["exp_avg_sq"], plain.state[q]["exp_avg_sq"], STATE[torch.float64])


@pytest.mark.parametrize("scale", [1024.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=ids)
@ADAPTIVE
def test_scaled_gradients_with_folded_unscale_equal_unscaled_ones(cls, dtype, scale, fast_target):
    shapes = [(6, 5), (9,)]
    params = [fast_target.parameter(t, dtype) for t in randoms(shapes)]
    keywords = {"lr": 0.01, "weight_decay": 0.1, "max_grad_norm": 0.7}
    contest = Duel(fast_target, cls, [{"params": params}], keywords, dtype)
    contest.optimizer.grad_scale = torch.tensor(scale, device=fast_target.device)
    for _ in range(3):
        contest.step(randoms(shapes, scale=scale), scale=scale)


def test_adatamw_is_adatam_on_a_parameter_shrunk_first(fast_target):
    """theta <- (1 - lr weight_decay) theta, then AdaTAM with the plain gradient: step by step, from the same state."""
    start = randoms([(6, 5)])[0]
    decayed, plain = fast_target.parameter(start), fast_target.parameter(start)
    w = fast_target.optimizer(torsion.AdaTAMW, [decayed], lr=0.01, weight_decay=0.3)
    a = fast_target.optimizer(torsion.AdaTAM, [plain], lr=0.01)
    for _ in range(4):
        with torch.no_grad():
            plain.mul_(1 - 0.01 * 0.3)
        decayed.grad = plain.grad = randoms([(6, 5)])[0].to(plain.device)
        w.step()
        a.step()
        close(decayed, plain, STATE[torch.float64])


@ADAPTIVE
def test_trains_a_classifier(cls, fast_target):
    """Two Gaussian clouds, logistic regression: the loss falls to a tenth."""
    x = torch.cat([torch.randn(64, 5) + 1.5, torch.randn(64, 5) - 1.5]).double().to(fast_target.device)
    y = torch.cat([torch.ones(64), torch.zeros(64)]).double().to(fast_target.device)
    p = fast_target.parameter(torch.zeros(5))
    optimizer = fast_target.optimizer(cls, [p], lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(x @ p, y)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]
