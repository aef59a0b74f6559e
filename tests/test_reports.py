"""What cosine, damping, grad_norm and skipped_steps say, and when."""

from __future__ import annotations

import pytest
import torch
from helpers import each_class, take_steps
from small import gradients, parameters, spoil

import torsion


def test_reports_before_and_after_steps_and_skips():
    optimizer = torsion.TAM(parameters())
    assert optimizer.cosine() == optimizer.damping() == {}
    assert float(optimizer.grad_norm()) == 0
    assert int(optimizer.skipped_steps()) == 0
    spoil(optimizer.param_groups[0]["params"])
    optimizer.step()
    assert float(optimizer.cosine()["global"]) == 0, "a skipped first step leaves the start values"
    assert float(optimizer.damping()["global"]) == 0.5
    assert not optimizer.grad_norm().isfinite()
    take_steps(optimizer, gradients(3))
    cosine, damping = optimizer.cosine()["global"], optimizer.damping()["global"]
    expected = torch.cat([g.flatten() for g in gradients(3)[-1]]).double().norm()
    assert float(optimizer.grad_norm()) == pytest.approx(float(expected), rel=1e-12)
    spoil(optimizer.param_groups[0]["params"])
    optimizer.step()
    assert torch.equal(optimizer.cosine()["global"], cosine)
    assert torch.equal(optimizer.damping()["global"], damping)
    assert int(optimizer.skipped_steps()) == 2
    for report in (cosine, damping, optimizer.grad_norm(), optimizer.skipped_steps()):
        assert report.shape == ()


def test_the_smoothed_cosine_in_the_state_is_what_damping_reports():
    optimizer = torsion.TAM(parameters(torch.float64), scope="tensor")
    take_steps(optimizer, gradients(4))
    for p, damping in zip(optimizer.param_groups[0]["params"], optimizer.damping().values(), strict=True):
        assert float(damping) == (1 + float(optimizer.state[p]["correlation"])) / 2


def test_the_norm_is_over_all_groups_and_before_clipping():
    params = parameters()
    optimizer = torsion.TAM([{"params": params[:1]}, {"params": params[1:]}], max_grad_norm=1e-3, scope="group")
    grads = gradients(1)
    take_steps(optimizer, grads)
    expected = torch.cat([g.flatten() for g in grads[0]]).double().norm()
    assert float(optimizer.grad_norm()) == pytest.approx(float(expected), rel=1e-12)


def test_a_load_keeps_the_count_of_skips_and_forgets_the_last_cosine():
    optimizer = torsion.TAM(parameters())
    take_steps(optimizer, gradients(2))
    spoil(optimizer.param_groups[0]["params"])
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.cosine() == {}
    assert int(optimizer.skipped_steps()) == 1


@each_class
def test_repr_shows_class_and_options(cls):
    text = repr(cls(parameters(), lr=0.25))
    assert text.startswith(f"{cls.__name__} (")
    assert "lr: 0.25" in text
    assert "scope: global" in text
