"""ASAM: which tensors are scaled by |w| + eta, and from which weights the scale is taken."""

from __future__ import annotations

import pytest
import tolerances
import torch
from cycles import SGD, give, phases, values_of
from tolerances import close

import torsion


def _moved(optimizer, grads):
    before = values_of(optimizer)
    give(optimizer, grads)
    optimizer.ascent_step()
    return [a - b for a, b in zip(values_of(optimizer), before, strict=True)]


ONES, W = torch.ones(2, 2, dtype=torch.float64), 3.0


def _asam(target, groups, **settings):
    base = SGD(groups, lr=0.1)
    return target.optimizer(torsion.Lookbehind, base, rho=1.0, asam=True, eta=0.5, **settings)


@pytest.mark.parametrize(
    ("names", "second_scaled"),
    [
        (("layer.weight", "layer.bias"), False),
        (("norm.weight", "in_proj_weight"), True),
        (("conv.weight", "scale"), False),
    ],
    ids=str,
)
def test_asam_scales_by_name(names, second_scaled, target):
    """The author's rule, whatever the shape: both tensors have two dimensions."""
    params = [target.parameter(W * ONES) for _ in names]
    first, second = _moved(_asam(target, zip(names, params, strict=True)), [ONES, ONES])
    scales = [3.5, 3.5 if second_scaled else 1.0]
    length = (4 * scales[0] ** 2 + 4 * scales[1] ** 2) ** 0.5
    for moved, t in zip((first, second), scales, strict=True):
        close(moved, t * t * ONES / length, tolerances.STATE[torch.float64])


@pytest.mark.parametrize("said", [None, True, False])
def test_asam_scales_two_dimensions_where_names_are_unknown_unless_a_group_says(said, target):
    params = [target.parameter(W * ONES), target.parameter(W * ONES[0])]
    group = {"params": params} if said is None else {"params": params, "asam_scaled": said}
    moved = _moved(_asam(target, [group]), [ONES, ONES[0]])
    scales = [3.5, 1.0] if said is None else [3.5 if said else 1.0] * 2
    length = (4 * scales[0] ** 2 + 2 * scales[1] ** 2) ** 0.5
    for t, d, ones in zip(scales, moved, (ONES, ONES[0]), strict=True):
        close(d, t * t * ones / length, tolerances.STATE[torch.float64])


def test_a_groups_word_wins_over_names_and_holds_for_its_group_alone(target):
    groups = [
        {"params": [("a.weight", target.parameter(W * ONES))], "asam_scaled": False},
        {"params": [("b.bias", target.parameter(W * ONES))], "asam_scaled": True},
        {"params": [("c.weight", target.parameter(W * ONES))]},
    ]
    moved = _moved(_asam(target, groups), [ONES] * 3)
    scales = [1.0, 3.5, 3.5]
    length = (4 * sum(t * t for t in scales)) ** 0.5
    for t, d in zip(scales, moved, strict=True):
        close(d, t * t * ONES / length, tolerances.STATE[torch.float64])


def test_the_scale_is_taken_anew_from_the_perturbed_weights(target):
    p = target.parameter([[1.0]])
    optimizer = _asam(target, [p], k=2)
    phases(optimizer, [[torch.ones(1, 1)]] * 2, 2)
    # One tensor of one element: q grows by T each time, T = |q| + 1/2.
    close(p, torch.tensor([[1.0 + 1.5 + 3.0]]), tolerances.STATE[torch.float64])
