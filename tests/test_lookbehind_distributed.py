"""Lookbehind in two processes: DDP and FSDP2 equal one process, m-sharpness, findings, checkpoints of the base."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cycles import BASE, order_of
from helpers import same_bits
from ranks import WORLD, Workers
from test_distributed import backward, batch, network, sharded, whole
from tolerances import REORDERED, close
from torch import Tensor, nn
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.nn.parallel import DistributedDataParallel

import torsion

pytestmark = pytest.mark.dist

SETTINGS: dict[str, dict[str, Any]] = {
    "fixed": {"k": 2, "rho": 0.2},
    "adaptive": {"k": 3, "rho": 0.2, "alpha": "adaptive"},
    "adaptive-global": {"k": 2, "rho": 0.2, "alpha": "adaptive", "alpha_scope": "global"},
    "asam": {"k": 2, "rho": 0.5, "asam": True},
    "full": {"k": 2, "rho": 0.2, "reuse_gradients": False},
}
NAN = float("nan")


def optimizer_of(base: str, model: nn.Module, **settings: Any) -> Any:
    return torsion.Lookbehind(BASE[base].build(model.named_parameters()), **settings)


def order(optimizer_settings: dict[str, Any]) -> list[str]:
    return order_of(optimizer_settings["k"], optimizer_settings.get("reuse_gradients", True))


def values(optimizer: Any) -> list[Tensor]:
    """Every parameter and all its state, unsharded."""
    result = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.base_optimizer.state.get(p, {})
            result += [whole(p), *(whole(state[k]) for k in sorted(state) if isinstance(state[k], Tensor))]
    return result


def assert_equal_runs(optimizer: Any, alone: Any, where: str) -> None:
    for a, b in zip(values(optimizer), values(alone), strict=True):
        close(a, b, REORDERED, where)
    assert int(optimizer.skipped_steps()) == int(alone.skipped_steps()), where


def assert_ranks_agree(tensors: Sequence[Tensor]) -> None:
    mine = torch.cat([t.detach().double().flatten() for t in tensors])
    others = [torch.empty_like(mine) for _ in range(WORLD)]
    dist.all_gather(others, mine)
    assert torch.equal(others[0], others[1]), "replicas drifted apart"


def outer_steps(
    model: nn.Module, optimizer: Any, lonely: nn.Module, alone: Any, rank: int, settings: dict[str, Any]
) -> None:
    """Two outer steps of both, each phase compared: the halves of a batch against the whole."""
    for step in range(2):
        for j, phase in enumerate(order(settings)):
            backward(model, step, rank)
            backward(lonely, step)
            getattr(optimizer, phase)()
            getattr(alone, phase)()
            assert_equal_runs(optimizer, alone, f"step {step}, phase {j}")


# Global ascent: the same as one process on the joint batch


def rank_fsdp(rank: int, base: str, settings: dict[str, Any], mesh_shape: tuple[int, ...] = (WORLD,)) -> list[int]:
    model, lonely = sharded(mesh_shape), network()
    optimizer, alone = optimizer_of(base, model, **settings), optimizer_of(base, lonely, **settings)
    outer_steps(model, optimizer, lonely, alone, rank, settings)
    return [p._local_tensor.numel() for p in model.parameters()]


@pytest.mark.parametrize("chosen", SETTINGS)
def test_fsdp_equals_one_process(workers: Workers, chosen: str) -> None:
    shares = workers.run(rank_fsdp, "sgd-momentum", SETTINGS[chosen])
    assert 0 in shares[1], "no rank was left with nothing: the test no longer tests that"
    assert shares[0] != shares[1]


@pytest.mark.parametrize("base", ["adamw", "tam", "adatamw", "own-sgd"])
def test_fsdp_equals_one_process_with_other_bases(workers: Workers, base: str) -> None:
    workers.run(rank_fsdp, base, SETTINGS["adaptive"])


@pytest.mark.parametrize("mesh_shape", [(2, 1), (1, 2)], ids=["replicated", "sharded"])
def test_hybrid_sharding_counts_copies_once(workers: Workers, mesh_shape: tuple[int, int]) -> None:
    workers.run(rank_fsdp, "sgd-momentum", SETTINGS["adaptive-global"], mesh_shape)


def rank_closure(rank: int) -> None:
    model, lonely = sharded(), network()
    optimizer, alone = optimizer_of("sgd-momentum", model), optimizer_of("sgd-momentum", lonely)
    for step in range(2):
        x, y = batch(step)

        def closure(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            model.zero_grad()
            loss = nn.functional.mse_loss(model(x), y)
            loss.backward()
            return loss

        optimizer.step(lambda x=x, y=y: closure(model, x[rank::WORLD], y[rank::WORLD]))
        alone.step(lambda x=x, y=y: closure(lonely, x, y))
        assert_equal_runs(optimizer, alone, f"step {step}")


def test_fsdp_with_a_closure(workers: Workers) -> None:
    workers.run(rank_closure)


def rank_slow_weights(rank: int) -> None:
    model = sharded()
    optimizer = optimizer_of("sgd-momentum", model, k=2)
    start = [whole(p) for p in model.parameters()]
    for phase in ("ascent_step", "descent_step"):
        backward(model, 0, rank)
        getattr(optimizer, phase)()
    perturbed = [whole(p) for p in model.parameters()]
    assert not same_bits(perturbed, start)
    with optimizer.slow_weights():
        assert same_bits([whole(p) for p in model.parameters()], start)
    assert same_bits([whole(p) for p in model.parameters()], perturbed)
    optimizer.abandon()
    assert same_bits([whole(p) for p in model.parameters()], start)


def test_fsdp_shows_slow_weights_and_abandons(workers: Workers) -> None:
    workers.run(rank_slow_weights)


def rank_ddp(rank: int, base: str, settings: dict[str, Any], views: bool) -> None:
    wrapped, lonely = DistributedDataParallel(network(), gradient_as_bucket_view=views), network()
    optimizer, alone = optimizer_of(base, wrapped.module, **settings), optimizer_of(base, lonely, **settings)
    outer_steps(wrapped, optimizer, lonely, alone, rank, settings)
    assert_ranks_agree(list(wrapped.parameters()))


@pytest.mark.parametrize("views", [False, True], ids=["copies", "bucket-views"])
@pytest.mark.parametrize("base", ["sgd-momentum", "tam", "own-sgd"])
def test_ddp_equals_one_process(workers: Workers, base: str, views: bool) -> None:
    workers.run(rank_ddp, base, SETTINGS["adaptive"], views)


# A finding on one rank


def rank_bad_gradient(rank: int, base: str, settings: dict[str, Any]) -> None:
    for at in range(len(order(settings))):
        model = sharded()
        optimizer = optimizer_of(base, model, **settings)
        for phase in order(settings):
            backward(model, 0, rank)
            getattr(optimizer, phase)()
        start = [whole(p) for p in model.parameters()]
        for j, phase in enumerate(order(settings)):
            backward(model, 1, rank)
            if j == at and rank == 1:
                model[0].weight.grad._local_tensor[0, 0] = NAN
            getattr(optimizer, phase)()
        assert same_bits([whole(p) for p in model.parameters()], start), f"evaluation {at}"
        assert int(optimizer.skipped_steps()) == 1, f"evaluation {at}"
        for phase in order(settings):
            backward(model, 2, rank)
            getattr(optimizer, phase)()
        assert not same_bits([whole(p) for p in model.parameters()], start)
        assert all(v.isfinite().all() for v in values(optimizer))
        assert int(optimizer.skipped_steps()) == 1, f"evaluation {at}"


@pytest.mark.parametrize("base", ["sgd-momentum", "tam", "own-sgd"])
def test_a_bad_gradient_on_one_rank_abandons_on_all(workers: Workers, base: str) -> None:
    workers.run(rank_bad_gradient, base, SETTINGS["adaptive"])


def rank_scaler(rank: int) -> float:
    model, settings = sharded(), SETTINGS["fixed"]
    optimizer = optimizer_of("sgd-momentum", model, **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    start = [whole(p) for p in model.parameters()]
    for step in range(2):
        x, y = batch(step)
        for j, phase in enumerate(order(settings)):
            optimizer.zero_grad()
            scaler.scale(nn.functional.mse_loss(model(x[rank::WORLD]), y[rank::WORLD])).backward()
            if step == 0 and j == 1 and rank == 0:
                model[2].weight.grad._local_tensor[0, 0] = float("inf")
            scaler.unscale_(optimizer)
            getattr(optimizer, phase)()
            scaler.update()
        assert same_bits([whole(p) for p in model.parameters()], start) == (step == 0)
    assert int(optimizer.skipped_steps()) == 1
    return float(scaler.get_scale())


def test_a_grad_scaler_with_fsdp(workers: Workers) -> None:
    a, b = workers.run(rank_scaler)
    assert a == b == 2.0**11


# m-sharpness: the ascent by the gradient of the rank's own part, the descent by the average


def local_backward(wrapped: DistributedDataParallel, step: int, rank: int) -> None:
    with wrapped.no_sync():
        backward(wrapped, step, rank)


def gradients_at(model: nn.Module, weights: Sequence[Tensor], step: int, rank: int) -> list[Tensor]:
    with torch.no_grad():
        for p, v in zip(model.parameters(), weights, strict=True):
            p.copy_(v)
    backward(model, step, rank)
    return [p.grad.clone() for p in model.parameters()]


def simulated(steps: int, k: int, rho: float, alpha: float, lr: float) -> list[Tensor]:
    """Both ranks in one process, from the description: plain SGD, float64."""
    model = network()
    s = [p.detach().clone() for p in model.parameters()]
    for step in range(steps):
        q, f = [[t.clone() for t in s] for _ in range(WORLD)], [t.clone() for t in s]
        for _ in range(k):
            for r in range(WORLD):
                a = gradients_at(model, q[r], step, r)
                length = torch.cat([t.flatten() for t in a]).norm()
                q[r] = [x + rho * t / length for x, t in zip(q[r], a, strict=True)]
            b = [gradients_at(model, q[r], step, r) for r in range(WORLD)]
            f = [x - lr * sum(parts) / WORLD for x, *parts in zip(f, *b, strict=True)]
        s = [x + alpha * (y - x) for x, y in zip(s, f, strict=True)]
    return s


def rank_m_sharpness(rank: int) -> None:
    wrapped = DistributedDataParallel(network())
    optimizer = optimizer_of("sgd", wrapped.module, k=2, rho=0.3, alpha=0.5, reuse_gradients=False)
    for step in range(3):
        for _ in range(2):
            local_backward(wrapped, step, rank)
            optimizer.ascent_step()
            backward(wrapped, step, rank)
            optimizer.descent_step()
    for p, wanted in zip(wrapped.parameters(), simulated(3, 2, 0.3, 0.5, BASE["sgd"].options["lr"]), strict=True):
        close(p, wanted, REORDERED)
    assert_ranks_agree(list(wrapped.parameters()))


def test_m_sharpness_is_its_own_algorithm(workers: Workers) -> None:
    """Each rank perturbs by its own half of the batch; the descents keep the ranks together."""
    workers.run(rank_m_sharpness)


def rank_m_sharpness_bad(rank: int) -> None:
    """Every rank learns of a local finding before it ascends, else one would go on alone."""
    wrapped = DistributedDataParallel(network())
    settings = {"k": 2, "rho": 0.3, "reuse_gradients": False}
    optimizer = optimizer_of("sgd-momentum", wrapped.module, **settings)
    start = [p.detach().clone() for p in wrapped.parameters()]
    for step in range(3):
        for i in range(2):
            local_backward(wrapped, step, rank)
            if step == 0 and i == 1 and rank == 1:
                wrapped.module[0].weight.grad[0, 0] = NAN
            bad = ~torch.stack([p.grad.isfinite().all() for p in wrapped.parameters()]).all()
            found = bad.float()
            dist.all_reduce(found, op=dist.ReduceOp.MAX)
            optimizer.ascent_step(found_inf=found)
            backward(wrapped, step, rank)
            optimizer.descent_step()
        assert same_bits([p.detach() for p in wrapped.parameters()], start) == (step == 0)
        assert int(optimizer.skipped_steps()) == 1
        assert_ranks_agree(values(optimizer))


def test_a_local_finding_under_m_sharpness_is_shared(workers: Workers) -> None:
    workers.run(rank_m_sharpness_bad)


# Checkpoints through the base


def rank_round_trip(rank: int, base: str, folder: str | None) -> None:
    """Two outer steps, then a fresh model and optimizer: the same bits as without a stop."""
    settings = SETTINGS["adaptive"]
    model = sharded()
    optimizer = optimizer_of(base, model, **settings)

    def outer_step(m: nn.Module, o: Any, step: int) -> None:
        for phase in order(settings):
            backward(m, step, rank)
            getattr(o, phase)()

    for step in range(2):
        outer_step(model, optimizer, step)
    saved_model = {k: v.clone() for k, v in model.state_dict().items()}
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer.base_optimizer))
    fresh = sharded()
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    other = optimizer_of(base, fresh, **settings)
    if folder is not None:
        dcp_save({"model": saved_model, "optimizer": saved}, checkpoint_id=folder)
        into = {
            "model": fresh.state_dict(),
            "optimizer": get_optimizer_state_dict(fresh, other.base_optimizer),
        }
        dcp_load(into, checkpoint_id=folder)
        saved_model, saved = into["model"], into["optimizer"]
    fresh.load_state_dict(saved_model)
    set_optimizer_state_dict(fresh, other.base_optimizer, saved)
    assert same_bits(values(other), values(optimizer))
    for step in range(2, 4):
        outer_step(model, optimizer, step)
        outer_step(fresh, other, step)
        assert same_bits(values(other), values(optimizer)), f"step {step}"


@pytest.mark.parametrize("on_disk", [False, True], ids=["get-set", "dcp"])
@pytest.mark.parametrize("base", ["sgd-momentum", "adamw", "tam"])
def test_sharded_state_goes_round_bit_for_bit(workers: Workers, tmp_path: Path, base: str, on_disk: bool) -> None:
    workers.run(rank_round_trip, base, str(tmp_path / "checkpoint") if on_disk else None)
