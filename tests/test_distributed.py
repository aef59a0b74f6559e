"""Two processes equal one: DDP, FSDP2 on a CPU mesh, and the checkpoints of sharded training.

The functions named ``rank_*`` run in the workers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from helpers import ids, same_bits
from ranks import WORLD, Workers
from tolerances import REORDERED, close
from torch import Tensor, nn
from torch.distributed.checkpoint import load as dcp_load
from torch.distributed.checkpoint import save as dcp_save
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import torsion
from torsion.optim import _sharding

pytestmark = pytest.mark.dist

# Models and data, the same on every rank and in one process


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Rows that two ranks share unevenly (3 and 5) and that leave the second with nothing (1)."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1)).to(dtype)


def batch(step: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(100 + step)
    return torch.randn(8, 4, dtype=torch.float64), torch.randn(8, 1, dtype=torch.float64)


def backward(model: nn.Module, step: int, rank: int | None = None) -> None:
    """Gradients of the mean loss over the batch, or over one rank's half of it."""
    x, y = batch(step)
    if rank is not None:
        x, y = x[rank::WORLD], y[rank::WORLD]
    model.zero_grad()
    nn.functional.mse_loss(model(x), y).backward()


def sharded(mesh_shape: tuple[int, ...] = (WORLD,)) -> nn.Sequential:
    model = network()
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def optimizer_of(cls: Any, model: nn.Module, **options: Any) -> Any:
    """Two groups, so that scope="group" means something."""
    named = list(model.named_parameters())
    weights = [(n, p) for n, p in named if n.endswith("weight")]
    others = [(n, p) for n, p in named if not n.endswith("weight")]
    lr = 0.05 if cls is torsion.TAM else 0.002
    groups = [{"params": weights, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return cls(groups, lr=lr, **options)


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone()


def values(optimizer: Any) -> list[Tensor]:
    """Every parameter and all its state, unsharded."""
    result = []
    for group in optimizer.param_groups:
        for p in group["params"]:
            state = optimizer.state[p]
            result += [whole(p), *(whole(state[k]) for k in sorted(state))]
    return result


def assert_equal_runs(optimizer: Any, alone: Any, step: int) -> None:
    for a, b in zip(values(optimizer), values(alone), strict=True):
        close(a, b, REORDERED, f"step {step}")
    for report in ("cosine", "damping"):
        ours, theirs = getattr(optimizer, report)(), getattr(alone, report)()
        assert ours.keys() == theirs.keys()
        for key in ours:
            close(ours[key], theirs[key], REORDERED, f"step {step}: {report} of {key}")
    close(optimizer.grad_norm(), alone.grad_norm(), REORDERED, f"step {step}: gradient norm")
    assert int(optimizer.skipped_steps()) == int(alone.skipped_steps())


# FSDP2


def rank_fsdp(rank: int, cls: Any, options: dict[str, Any], mesh_shape: tuple[int, ...] = (WORLD,)) -> list[int]:
    model, lonely = sharded(mesh_shape), network()
    optimizer, alone = optimizer_of(cls, model, **options), optimizer_of(cls, lonely, **options)
    for step in range(6):
        backward(model, step, rank)
        backward(lonely, step)
        optimizer.step()
        alone.step()
        assert_equal_runs(optimizer, alone, step)
    return [p._local_tensor.numel() for p in model.parameters()]


@pytest.mark.parametrize("cls", [torsion.TAM, torsion.AdaTAMW], ids=ids)
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
def test_fsdp_equals_one_process(workers: Workers, cls: Any, scope: str) -> None:
    shares = workers.run(rank_fsdp, cls, {"scope": scope})
    assert 0 in shares[1], "no rank was left with nothing: the test no longer tests that"
    assert shares[0] != shares[1]


@pytest.mark.parametrize("cls", [torsion.TAM, torsion.AdaTAMW], ids=ids)
def test_fsdp_clips_by_the_norm_of_all_ranks(workers: Workers, cls: Any) -> None:
    workers.run(rank_fsdp, cls, {"max_grad_norm": 0.1})


def test_fsdp_seeds_clones_alike(workers: Workers) -> None:
    workers.run(rank_fsdp, torsion.TAM, {"scope": "group", "init": "clone"})


def test_fsdp_runs_the_reference(workers: Workers) -> None:
    workers.run(rank_fsdp, torsion.TAM, {"backend": "reference"})


@pytest.mark.parametrize("mesh_shape", [(2, 1), (1, 2)], ids=["replicated", "sharded"])
def test_hybrid_sharding_counts_copies_once(workers: Workers, mesh_shape: tuple[int, int]) -> None:
    workers.run(rank_fsdp, torsion.TAM, {"max_grad_norm": 0.1}, mesh_shape)


def rank_mixed(rank: int, cls: Any) -> None:
    model, lonely = network(), network()
    mesh = init_device_mesh("cpu", (WORLD,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model[4], mesh=mesh)
    options = {"max_grad_norm": 0.1, "scope": "group"}
    optimizer, alone = optimizer_of(cls, model, **options), optimizer_of(cls, lonely, **options)
    for step in range(4):
        backward(model, step, rank)
        for p in model[2].parameters():
            dist.all_reduce(p.grad)
            p.grad /= WORLD
        backward(lonely, step)
        optimizer.step()
        alone.step()
        assert_equal_runs(optimizer, alone, step)


@pytest.mark.parametrize("cls", [torsion.TAM, torsion.AdaTAMW], ids=ids)
def test_replicated_parameters_beside_sharded_ones_count_once(workers: Workers, cls: Any) -> None:
    workers.run(rank_mixed, cls)


def rank_pending_sums(rank: int) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(4)
    start, grads = torch.randn(3, 2, dtype=torch.float64), torch.randn(5, 3, 2, dtype=torch.float64)
    p, q = nn.Parameter(distribute_tensor(start.clone(), mesh, [Replicate()])), nn.Parameter(start.clone())
    optimizer, alone = torsion.TAM([p], lr=0.1), torsion.TAM([q], lr=0.1)
    for step, grad in enumerate(grads):
        p.grad = DTensor.from_local(grad * (0.25 if rank else 0.75), mesh, [Partial()])
        q.grad = grad
        optimizer.step()
        alone.step()
        assert_equal_runs(optimizer, alone, step)


def test_gradients_that_are_still_to_be_added(workers: Workers) -> None:
    """As tensor parallelism leaves them on replicated parameters."""
    workers.run(rank_pending_sums)


def test_meshes_that_do_not_contain_each_other() -> None:
    def parameter(*ranks: int) -> Any:
        mesh = SimpleNamespace(mesh=torch.tensor(ranks), size=lambda: len(ranks))
        return SimpleNamespace(_local_tensor=None, placements=(), device_mesh=mesh)

    _sharding.Mesh([parameter(0, 1, 2), parameter(1, 2)])
    with pytest.raises(ValueError, match=r"different ranks.*give each its own optimizer"):
        _sharding.Mesh([parameter(0, 1), parameter(1, 2)])


def rank_bad_gradient(rank: int, value: float) -> tuple[list[int], list[bool], list[float]]:
    model = sharded()
    optimizer = optimizer_of(torsion.TAM, model)
    backward(model, 0, rank)
    optimizer.step()
    before = values(optimizer)
    backward(model, 1, rank)
    if rank == 1:
        model[0].weight.grad._local_tensor[0, 0] = value
    optimizer.step()
    skipped, norms = [int(optimizer.skipped_steps())], [float(optimizer.grad_norm())]
    same = [same_bits(values(optimizer), before)]
    backward(model, 2, rank)
    if rank == 0:
        optimizer.found_inf = torch.tensor(0.0)
    else:
        optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    skipped.append(int(optimizer.skipped_steps()))
    norms.append(float(optimizer.grad_norm()))
    same.append(same_bits(values(optimizer), before))
    del optimizer.found_inf
    optimizer.step()
    same.append(same_bits(values(optimizer), before))
    return [*skipped, int(optimizer.skipped_steps())], same, norms


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_finding_on_one_rank_skips_on_all(workers: Workers, value: float) -> None:
    for skipped, same, norms in workers.run(rank_bad_gradient, value):
        assert skipped == [1, 2, 2]
        assert same == [True, True, False]
        assert not any(torch.tensor(norms).isfinite())


def rank_scaler(rank: int) -> float:
    model, lonely = sharded(), network()
    optimizer, alone = optimizer_of(torsion.TAM, model), optimizer_of(torsion.TAM, lonely)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    for step in range(6):
        x, y = batch(step)
        optimizer.zero_grad()
        scaler.scale(nn.functional.mse_loss(model(x[rank::WORLD]), y[rank::WORLD])).backward()
        if step == 3 and rank == 0:
            model[2].weight.grad._local_tensor[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        if step != 3:
            backward(lonely, step)
            alone.step()
            for a, b in zip(values(optimizer), values(alone), strict=True):
                close(a, b, REORDERED, f"step {step}")
    assert int(optimizer.skipped_steps()) == 1
    return float(scaler.get_scale())


def test_grad_scaler_with_fsdp(workers: Workers) -> None:
    a, b = workers.run(rank_scaler)
    assert a == b == 2.0**13, "twice doubled, halved once, and two good steps since"


# DDP


def rank_ddp(rank: int, cls: Any, views: bool) -> None:
    wrapped, lonely = DistributedDataParallel(network(), gradient_as_bucket_view=views), network()
    options = {"max_grad_norm": 0.2}
    optimizer, alone = optimizer_of(cls, wrapped.module, **options), optimizer_of(cls, lonely, **options)
    for step in range(5):
        backward(wrapped, step, rank)
        backward(lonely, step)
        optimizer.step()
        alone.step()
        assert_equal_runs(optimizer, alone, step)
    mine = torch.cat([p.detach().flatten() for p in wrapped.parameters()])
    others = [torch.empty_like(mine) for _ in range(WORLD)]
    dist.all_gather(others, mine)
    assert torch.equal(others[0], others[1]), "replicas drifted apart"


@pytest.mark.parametrize("views", [False, True], ids=["copies", "bucket-views"])
@pytest.mark.parametrize("cls", [torsion.TAM, torsion.AdaTAMW], ids=ids)
def test_ddp_equals_one_process(workers: Workers, cls: Any, views: bool) -> None:
    workers.run(rank_ddp, cls, views)


# Checkpoints


def rank_round_trip(rank: int, cls: Any, folder: str | None) -> None:
    """Stop after three steps, load into a fresh model and optimizer, go on: the same bits as without a stop."""
    model = sharded()
    optimizer = optimizer_of(cls, model, scope="group")
    for step in range(3):
        backward(model, step, rank)
        optimizer.step()
    saved_model = {k: v.clone() for k, v in model.state_dict().items()}
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    if folder is not None:
        dcp_save({"model": saved_model, "optimizer": saved}, checkpoint_id=folder)

    fresh = sharded()
    with torch.no_grad():
        for p in fresh.parameters():
            p.zero_()
    other = optimizer_of(cls, fresh, scope="group")
    if folder is not None:
        saved = get_optimizer_state_dict(fresh, other)  # without state: torch takes a step to have some
        into = {"model": fresh.state_dict(), "optimizer": saved}
        dcp_load(into, checkpoint_id=folder)
        saved_model = into["model"]
    fresh.load_state_dict(saved_model)
    set_optimizer_state_dict(fresh, other, saved)
    assert same_bits(values(other), values(optimizer))
    for step in range(3, 6):
        for m, o in ((model, optimizer), (fresh, other)):
            backward(m, step, rank)
            o.step()
        assert same_bits(values(other), values(optimizer)), f"step {step}"
    assert [g["lr"] for g in other.param_groups] == [g["lr"] for g in optimizer.param_groups]


@pytest.mark.parametrize("on_disk", [False, True], ids=["get-set", "dcp"])
@pytest.mark.parametrize("cls", [torsion.TAM, torsion.AdaTAMW], ids=ids)
def test_sharded_state_goes_round_bit_for_bit(workers: Workers, tmp_path: Path, cls: Any, on_disk: bool) -> None:
    workers.run(rank_round_trip, cls, str(tmp_path / "checkpoint") if on_disk else None)


def rank_full_state(rank: int) -> None:
    """Gather a sharded run into one process, and spread it again."""
    model = sharded()
    optimizer = optimizer_of(torsion.AdaTAMW, model)
    for step in range(3):
        backward(model, step, rank)
        optimizer.step()
    everything = StateDictOptions(full_state_dict=True)
    full = get_optimizer_state_dict(model, optimizer, options=everything)

    lonely = network()
    with torch.no_grad():
        for p, q in zip(lonely.parameters(), model.parameters(), strict=True):
            p.copy_(whole(q))
    alone = optimizer_of(torsion.AdaTAMW, lonely)
    set_optimizer_state_dict(lonely, alone, copy.deepcopy(full), options=everything)
    assert same_bits(values(alone), values(optimizer))

    model.zero_grad()  # torch makes state for a fresh optimizer only where there is no gradient yet
    again = optimizer_of(torsion.AdaTAMW, model)
    set_optimizer_state_dict(model, again, copy.deepcopy(full), options=everything)
    assert same_bits(values(again), values(optimizer))
    backward(model, 3, rank)
    backward(lonely, 3)
    again.step()
    alone.step()
    for a, b in zip(values(again), values(alone), strict=True):
        close(a, b, REORDERED)


def test_full_state_moves_between_sharded_and_plain(workers: Workers) -> None:
    workers.run(rank_full_state)


def rank_from_adam(rank: int) -> None:
    model = sharded()
    adam = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(2):
        backward(model, step, rank)
        adam.step()
    ours = torsion.AdaTAMW(model.parameters())
    ours.load_state_dict(adam.state_dict())
    backward(model, 2, rank)
    ours.step()
    back = torch.optim.AdamW(model.parameters())
    back.load_state_dict(ours.state_dict())
    backward(model, 3, rank)
    back.step()
    for p in model.parameters():
        assert isinstance(back.state[p]["exp_avg"], DTensor)
        assert float(back.state[p]["step"]) == 4


def test_torch_checkpoints_cross_while_sharded(workers: Workers) -> None:
    workers.run(rank_from_adam)


# Random rounding


def rank_stochastic(rank: int, cls: Any, columns: bool) -> None:
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(3)
    starts = [torch.randn(shape).bfloat16() for shape in [(5, 3), (7,), (1, 9), (4, 33)]]
    placement = [Shard(1 if columns else 0)]
    params = [nn.Parameter(distribute_tensor(t.clone(), mesh, placement if t.ndim > 1 else [Shard(0)])) for t in starts]
    plain = [nn.Parameter(t.clone()) for t in starts]
    optimizers = []
    for given in (params, plain):
        torch.manual_seed(7)  # the seed of the rounding is drawn when the optimizer is built
        optimizers.append(cls(given, lr=1e-2, stochastic_rounding=True))
    for step in range(5):
        torch.manual_seed(20 + step)
        for p, q in zip(params, plain, strict=True):
            q.grad = torch.randn(q.shape).bfloat16()
            p.grad = distribute_tensor(q.grad.clone(), mesh, p.placements)
        for optimizer in optimizers:
            optimizer.step()
        if not columns:
            assert same_bits([whole(p) for p in params], [whole(q) for q in plain]), f"step {step}"
    moved = [not torch.equal(whole(p), t) for p, t in zip(params, starts, strict=True)]
    assert all(moved)


@pytest.mark.parametrize("cls", [torsion.TAM, torsion.AdaTAMW], ids=ids)
def test_random_rounding_does_not_see_the_rows_sharding(workers: Workers, cls: Any) -> None:
    workers.run(rank_stochastic, cls, False)


def test_random_rounding_runs_with_sharded_columns(workers: Workers) -> None:
    workers.run(rank_stochastic, torsion.TAM, True)


# What does not work says so


def rank_refusals(rank: int) -> list[str]:
    model = sharded()
    optimizer = optimizer_of(torsion.TAM, model)
    backward(model, 0, rank)
    optimizer.step()
    before = values(optimizer)
    messages = []

    def refused(kind: type[Exception], call: Callable[[], Any]) -> None:
        with pytest.raises(kind) as error:
            call()
        messages.append(str(error.value))
        assert same_bits(values(optimizer), before)

    plain = optimizer_of(torsion.TAM, network())
    for p, q in zip(plain.param_groups[0]["params"], optimizer.param_groups[0]["params"], strict=True):
        plain.state[p]["momentum_buffer"] = torch.zeros_like(p)
        assert isinstance(q, DTensor)
    refused(ValueError, lambda: optimizer.load_state_dict(plain.state_dict()))

    backward(model, 1, rank)
    weight = optimizer.param_groups[0]["params"][0]
    held = optimizer.state[weight]["momentum_buffer"]
    optimizer.state[weight]["momentum_buffer"] = held.full_tensor()
    with pytest.raises(TypeError) as error:
        optimizer.step()
    messages.append(str(error.value))
    optimizer.state[weight]["momentum_buffer"] = held
    assert same_bits(values(optimizer), before)

    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError) as error:
        step()
    messages.append(str(error.value))
    assert same_bits(values(optimizer), before)
    return messages


def test_what_sharding_cannot_do_is_said(workers: Workers) -> None:
    for unsharded_checkpoint, unsharded_state, compiled in workers.run(rank_refusals):
        assert "0.weight" in unsharded_checkpoint
        assert "set_optimizer_state_dict" in unsharded_checkpoint
        assert "0.weight" in unsharded_state
        assert "distribute both or neither" in unsharded_state
        assert "0.weight" in compiled
        assert "outside torch.compile" in compiled
