"""No host sync: a step asks no tensor for its value. On a GPU each such question waits for everything queued before it.

On the CPU nothing waits, so the questions themselves are forbidden: below Python by a dispatch mode that sees
``_local_scalar_dense`` (``item``, ``bool``, ``float``, an index), in Python by patches that also see what never reaches
the dispatcher there (``cpu``, ``numpy``, ``tolist``). With a GPU, torch's own sync detector watches besides.

One tensor may be read: the table of the groups' numbers, which Python itself filled and which never leaves the host.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from helpers import each_class, take_steps
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import torsion


class Sync(AssertionError):
    pass


QUESTIONS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
}
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default}
METHODS = ["item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__", "is_nonzero"]


def _of_host_table(t, optimizer):
    table = optimizer._hyper if optimizer is not None else None
    return table is not None and t.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()


class _NoQuestions(TorchDispatchMode):
    def __init__(self, optimizer):
        super().__init__()
        self.optimizer = optimizer

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in QUESTIONS and not _of_host_table(args[0], self.optimizer):
            raise Sync(f"{func} in a step")
        if func in INDEXING and any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]):
            raise Sync("the size of a masked selection in a step")
        copies_to_host = func is torch.ops.aten._to_copy.default and args[0].device.type != "cpu"
        if copies_to_host and (kwargs or {}).get("device", args[0].device) == torch.device("cpu"):
            raise Sync("a copy to the CPU in a step")
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def no_sync(optimizer=None):
    """Everything inside raises :class:`Sync` when it asks a tensor for its value."""

    def forbidden(name, original):
        def method(self, *args, **kwargs):
            if not _of_host_table(self, optimizer):
                raise Sync(f"Tensor.{name} in a step")
            return original(self, *args, **kwargs)

        return method

    cuda = torch.cuda.is_available()
    with pytest.MonkeyPatch.context() as patch, _NoQuestions(optimizer):
        for name in METHODS:
            patch.setattr(Tensor, name, forbidden(name, getattr(Tensor, name)))
        if cuda:
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            if cuda:
                torch.cuda.set_sync_debug_mode("default")


# The test of the test


def _with_gradient(t):
    p = nn.Parameter(t)
    p.grad = t
    return p


CAUGHT = {
    "item": lambda t: t.item(),
    "bool": lambda t: bool(t > 0),
    "if": lambda t: 1 if t else 0,
    "float": lambda t: float(t),
    "int": lambda t: int(t),
    "index": lambda t: [1, 2, 3][t.long()],
    "cpu": lambda t: t.cpu(),
    "tolist": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
    "format": lambda t: f"{t:.3f}",
    "equal": lambda t: torch.equal(t, t),
    "in-a-list": lambda t: 1.0 in [t],
    "nonzero": lambda t: t.reshape(1).nonzero(),
    "mask": lambda t: t.reshape(1)[t.reshape(1) > 0],
    "python-op": lambda t: torch.ones(3)[: t.long()],
    "below-python": lambda t: torch.ops.aten._local_scalar_dense(t),
    "isfinite": lambda t: torch.isfinite(t).all().item(),
    "clip": lambda t: nn.utils.clip_grad_norm_([_with_gradient(t)], 1.0, error_if_nonfinite=True),
}


@pytest.mark.parametrize("question", CAUGHT.values(), ids=CAUGHT)
def test_a_question_is_caught(question):
    t = torch.tensor(2.0)
    with pytest.raises(Sync), no_sync():
        question(t)


def test_arithmetic_is_not_caught():
    with no_sync():
        t = torch.tensor(2.0)
        torch.where(t > 0, t.sqrt(), -t).clamp(max=1).double().add_(1)


def test_the_patches_are_gone_afterwards():
    with no_sync():
        pass
    assert torch.tensor(2.0).item() == 2
    assert torch.tensor([1]).tolist() == [1]


# The steps


def build(target, cls, dtypes=(torch.float32, torch.float32), rate=0.01, **options):
    torch.manual_seed(0)
    params = [
        nn.Parameter(torch.randn(s, device=target.device).to(d)) for s, d in zip([(5, 3), (7,)], dtypes, strict=True)
    ]
    return target.optimizer(cls, params, lr=rate, **options)


def set_gradients(optimizer, value=None):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.randn_like(p) if value is None else torch.full_like(p, value)


OPTIONS = {
    "defaults": {},
    "clipped": {"max_grad_norm": 0.1},
    "tensor-scope": {"scope": "tensor", "weight_decay": 0.1},
    "maximized": {"maximize": True},
    "low-precision": {"dtypes": (torch.bfloat16, torch.float16)},
    "mixed": {"dtypes": (torch.bfloat16, torch.float64)},
    "random-rounding": {"dtypes": (torch.bfloat16, torch.float32), "stochastic_rounding": True},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@each_class
def test_step(fast_target, cls, options):
    optimizer = build(fast_target, cls, **options)
    for _ in range(3):  # the first step makes state and plan, the second runs from the plan
        set_gradients(optimizer)
        with no_sync(optimizer):
            optimizer.step()
    assert int(optimizer.skipped_steps()) == 0


@each_class
def test_step_with_a_rate_on_the_device(fast_target, cls):
    rate = torch.tensor(0.01, device=fast_target.device)
    optimizer = build(fast_target, cls, rate=rate)
    for _ in range(3):
        set_gradients(optimizer)
        with no_sync(optimizer):
            rate.mul_(0.5)
            optimizer.step()


def test_first_steps_of_clones(fast_target):
    optimizer = build(fast_target, torsion.TAM, init="clone", scope="group")
    for _ in range(2):
        set_gradients(optimizer)
        with no_sync(optimizer):
            optimizer.step()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_skipped_step(fast_target, value):
    optimizer = build(fast_target, torsion.AdaTAMW)
    for v in (None, value, None):
        set_gradients(optimizer, v)
        with no_sync(optimizer):
            optimizer.step()
    assert int(optimizer.skipped_steps()) == 1


def test_reports(fast_target):
    optimizer = build(fast_target, torsion.TAM, scope="tensor")
    set_gradients(optimizer)
    with no_sync(optimizer):
        for _ in range(2):
            reports = optimizer.cosine(), optimizer.damping(), optimizer.grad_norm(), optimizer.skipped_steps()
            optimizer.step()
    assert len(reports[0]) == 2


@pytest.mark.parametrize("unscale", [False, True], ids=["folded", "unscaled-first"])
def test_grad_scaler_from_scale_to_update(fast_target, unscale):
    optimizer = build(fast_target, torsion.TAM, max_grad_norm=0.1)
    scaler = torch.amp.GradScaler(fast_target.device, init_scale=16.0, growth_interval=1)
    with no_sync(optimizer):
        for _ in range(3):
            loss = sum(p.square().sum() for p in optimizer.param_groups[0]["params"])
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert scaler.get_scale() == 128


def test_what_makes_a_new_plan(fast_target):
    """A late parameter, a new group, another layout, edited state and a loaded checkpoint."""
    optimizer = build(fast_target, torsion.AdaTAM)
    first, second = optimizer.param_groups[0]["params"]
    first.grad = torch.ones_like(first)
    with no_sync(optimizer):
        optimizer.step()
        second.grad = torch.ones_like(second)
        optimizer.step()
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(4, device=fast_target.device))]})
        set_gradients(optimizer)
        optimizer.step()
        first.grad = torch.ones_like(first).t().contiguous().t()
        optimizer.step()
        optimizer.state[second]["correlation"] = torch.zeros((), device=fast_target.device)
        optimizer.step()
        checkpoint = optimizer.state_dict()
        optimizer.load_state_dict(checkpoint)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.5
        optimizer.step()
    assert float(optimizer.state[second]["step"]) == 6


def test_closure_and_hooks_are_the_users_own(fast_target):
    """A user may ask for the loss; only the step itself must not."""
    optimizer = build(fast_target, torsion.TAM)
    losses = []

    def closure():
        set_gradients(optimizer)
        losses.append(sum(p.detach().sum().item() for p in optimizer.param_groups[0]["params"]))
        return losses[-1]

    assert optimizer.step(closure) == losses[0]
    take_steps(optimizer, [[torch.ones(5, 3), torch.ones(7)]])
