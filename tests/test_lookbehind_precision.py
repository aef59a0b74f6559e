"""Parameters of 8 and 11 bits: slow, fast and perturbed weights in float32 within an outer step, rounded at its end."""

from __future__ import annotations

import torch
from cycles import Base, ahead, each_base, evaluations, give, phases
from helpers import LOW, each_dtype, same_bits
from tolerances import STORED, close


@each_dtype(*LOW)
@each_base("sgd", "tam")
def test_small_steps_add_up_in_float32_within_an_outer_step(base, dtype, fast_target):
    """Each is a quarter of what moves 1 in this dtype; eight of them move it twice, rounded once."""
    step = torch.finfo(dtype).eps / 8
    p = fast_target.parameter([1.0], dtype)
    plain = Base(base.id, base.cls, {"lr": step, **({"momentum": 0.0} if base.id == "tam" else {})})
    optimizer = ahead(fast_target, plain, [p], k=8, rho=0.0, alpha=1.0)
    phases(optimizer, [[torch.ones(1)]] * 9, 8)
    weight = 1.0 - 8 * step
    if base.id == "tam":
        # s = 0 at the first descent (no momentum yet) and 1 from then on: damping climbs from 1/2
        s, weight = 0.0, 1.0
        for i in range(8):
            s = 0.9 * s + 0.1 * float(i > 0)
            weight -= step * (1e-8 + (1 + s) / 2)
    assert p.item() == torch.tensor(weight).to(dtype).item()
    assert p.item() != 1.0


@each_dtype(*LOW)
@each_base("sgd", "own-plain-sgd")
def test_small_climbs_add_up_in_float32(base, dtype, fast_target):
    step = torch.finfo(dtype).eps / 4
    p = fast_target.parameter([1.0], dtype)
    optimizer = ahead(fast_target, base, [p], k=8, rho=step, alpha=0.0)
    phases(optimizer, [[torch.ones(1)]] * 8, 8)
    assert p.item() == 1.0 + 8 * step
    give(optimizer, [torch.ones(1)])
    optimizer.descent_step()
    assert p.item() == 1.0


@each_dtype(*LOW)
@each_base("own-sgd", "adamw-amsgrad")
def test_the_general_path_steps_what_the_base_steps(base, dtype, fast_target):
    """A class of the user's steps parameters of their own dtype and rounds at each descent, as it would alone."""
    starts = [t.to(fast_target.device, dtype) for t in (torch.randn(33), torch.randn(4, 3))]
    params, alone = ([torch.nn.Parameter(t.clone()) for t in starts] for _ in range(2))
    optimizer, theirs = ahead(fast_target, base, params, k=3, alpha=0.4, rho=0.3), base.build(alone)
    for _ in range(2):
        grads = evaluations(optimizer, 4)
        for each in grads[1:]:
            for p, g in zip(alone, each, strict=True):
                p.grad = g
            theirs.step()
        phases(optimizer, grads, 3)
        for i, (p, f) in enumerate(zip(params, alone, strict=True)):
            s = starts[i].double()
            close(p, s + 0.4 * (f.detach().double() - s), STORED[dtype])
            for key, value in optimizer.state[p].items():
                assert same_bits([value], [theirs.state[f][key]]), key
            with torch.no_grad():
                f.copy_(p)
            starts[i] = p.detach().clone()
