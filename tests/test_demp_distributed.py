"""DemP in two processes: flags OR-ed, one cut on both, DistributedDataParallel wrapped anew, errors on both."""

from __future__ import annotations

import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from demp_runs import INPUTS, demp_of, everything, inputs, kill, mlp, revive, same, windows
from ranks import Workers
from test_demp_windows import experts
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import torsion

pytestmark = pytest.mark.dist

HALF = 8
"""Examples of each rank in a batch of 16."""


def build(rank: int, optimizer: Any = None, **settings: Any) -> tuple[Any, nn.Module, Any, DistributedDataParallel]:
    model = mlp()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=5e-3) if optimizer is None else optimizer(ddp.parameters())
    return demp_of(ddp, optimizer, **settings), model, optimizer, ddp


def step(rank: int, ddp: nn.Module, optimizer: Any, number: int) -> None:
    x = inputs(number)[rank * HALF :][:HALF]
    optimizer.zero_grad()
    nn.functional.cross_entropy(ddp(x), (x.sum(1) > 0).long()).backward()
    optimizer.step()


def on_all(value: Any) -> list[Any]:
    """The value of every rank."""
    found = [None, None]
    dist.all_gather_object(found, value)
    return found


def agree(model: nn.Module) -> None:
    """Assert that all ranks have the same parameters, bit for bit. Running statistics are each rank's own."""
    a, b = on_all([p.detach() for p in model.parameters()])
    assert same(a, b)


def only(rank: int, batch: int = 32) -> list[torch.Tensor]:
    """A window in which feature 0 is positive on rank 0 and negative on rank 1."""
    x = inputs(5000, batch)
    x[:, 0] = x[:, 0].abs() * (1 if rank == 0 else -1)
    return [x]


def alive_on_one_rank(model: nn.Sequential) -> None:
    """Unit 2 of the first layer follows feature 0 alone: alive on rank 0, dead on rank 1. Unit 5 is dead on both."""
    model.eval()
    with torch.no_grad():
        model[0].weight[2] = 0.0
        model[0].weight[2, 0] = 1.0
        model[0].bias[2] = 0.0
        model[1].weight[2], model[1].bias[2] = 1.0, 0.0
        model[1].running_mean[2], model[1].running_var[2] = 0.0, 1.0
    model.train()
    kill(model, 0, 5)


def rank_flags(rank: int) -> tuple[list[int], list[int]]:
    demp, model, *_ = build(rank, noise_std=0.0)
    alive_on_one_rank(model)
    alone = torsion.prune.live_units(model, only(rank))["0"]
    report = demp.finish(only(rank))
    assert (report.layers["0"].live, report.layers["0"].cut) == (7, 1)
    agree(model)
    return (~alone).nonzero().flatten().tolist(), demp._units["0"].kept.tolist()


def test_a_unit_alive_on_one_rank_lives_on_all(workers: Workers) -> None:
    (dead_0, kept_0), (dead_1, kept_1) = workers.run(rank_flags)
    assert 2 not in dead_0
    assert 2 in dead_1
    assert kept_0 == kept_1 == [0, 1, 2, 3, 4, 6, 7]


def rank_empty(rank: int) -> None:
    """A rank without batches takes the verdict of the others; without any, nothing is cut and all warn."""
    demp, model, *_ = build(rank, noise_std=0.0)
    kill(model, 0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        report = demp.finish(windows() if rank == 0 else [])
    assert report.layers["0"].cut == 1
    agree(model)
    kill(model, 0, 2)
    with pytest.warns(UserWarning, match="window is empty"):
        assert demp.finish([]).layers["0"].cut == 0


def test_a_rank_without_batches(workers: Workers) -> None:
    workers.run(rank_empty)


def rank_experts(rank: int) -> list[list[int]]:
    """A layer that no example of one rank reached: the verdict is that of the other; where neither saw it, it lives."""
    model = experts()
    ddp = DistributedDataParallel(model)
    demp = demp_of(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1))
    x = inputs(5000, 32)
    x[:, 0] = x[:, 0].abs() * (1 if rank == 0 else -1)
    cut = [[report.cut for report in demp.finish([x]).layers.values()]]
    with torch.no_grad():
        for up in model.up:
            up.weight[1], up.bias[1] = 0.0, -1.0
    x[:, 0] = x[:, 0].abs()
    cut.append([report.cut for report in demp.finish([x]).layers.values()])
    agree(model)
    return cut


def test_units_that_a_rank_has_not_seen(workers: Workers) -> None:
    assert workers.run(rank_experts) == [[[1, 1], [1, 0]]] * 2


def rank_padding(rank: int) -> list[int]:
    """The units kept for ``align`` go by the mean over both ranks."""
    demp, model, *_ = build(rank, noise_std=0.0, align=4, criterion="dormant", tau=0.5)
    demp.finish([inputs(5000 + rank, 32)])
    agree(model)
    return demp._units["0"].kept.tolist()


def test_alignment_agrees(workers: Workers) -> None:
    a, b = workers.run(rank_padding)
    assert a == b


def rank_weights(rank: int) -> list[int]:
    """Unit 1 acts by 1 in the three batches of rank 0, unit 2 by 2 in the one of rank 1; ``align`` keeps one."""
    demp, model, *_ = build(rank, noise_std=0.0, align=7, window=3, criterion="dormant", tau=0.5)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].weight[1, 0], model[0].weight[2, 0] = 1.0, -1.0
        model[0].bias.fill_(100.0)[1:3] = 0.0
        model[1].bias.zero_()
    x = inputs()
    x[:, 0] = 1.0 if rank == 0 else -2.0
    demp.finish([x] * (3 if rank == 0 else 1))
    agree(model)
    return demp._units["0"].kept.tolist()


def test_every_batch_counts_alike_on_whatever_rank(workers: Workers) -> None:
    assert workers.run(rank_weights) == [[0, 1, 3, 4, 5, 6, 7]] * 2


def rank_train(rank: int, kind: str) -> tuple[list[int], list[float]]:
    """Twelve steps with cuts at 4 and 8; the same as one process on the whole batch but for rounding."""
    optimizers = {
        "adamw": lambda ps: torch.optim.AdamW(ps, lr=5e-3),
        "tam": lambda ps: torsion.TAM(ps, lr=0.05),
    }
    demp, model, optimizer, ddp = build(rank, optimizers[kind], noise_std=1e-2)
    sizes = []
    for number in range(12):
        if number in (2, 6):
            kill(model, 0, 1 if number == 2 else 3)
        step(rank, ddp, optimizer, number)
        agree(model)
        report = demp.step([inputs(5000 + rank, 32)])
        if report is None:
            assert demp.rewrap(ddp) is ddp
            continue
        old, ddp = ddp, demp.rewrap(ddp)
        if report.parameters_after < report.parameters_before:
            assert ddp is not old
            with pytest.raises(RuntimeError, match=r"made before a cut.*rewrap"):
                old(inputs())
        assert demp.rewrap(ddp) is ddp
        sizes.append(model[0].out_features)
    assert ddp.module is model
    assert [id(p) for g in optimizer.param_groups for p in g["params"]] == [id(p) for p in ddp.parameters()]
    return sizes, [float(p.detach().sum()) for p in model.parameters()]


@pytest.mark.parametrize("kind", ["adamw", "tam"])
def test_ranks_stay_together_through_cuts(workers: Workers, kind: str) -> None:
    (sizes_0, sums_0), (sizes_1, sums_1) = workers.run(rank_train, kind)
    assert sizes_0 == sizes_1 == [7, 6, 6]
    assert sums_0 == sums_1


def rank_settings(rank: int) -> None:
    model = mlp()
    newer = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    own = {"forward_sync_buffers" if newer else "broadcast_buffers": False}
    ddp = DistributedDataParallel(
        model, **own, gradient_as_bucket_view=True, find_unused_parameters=True, bucket_cap_mb=3
    )
    demp = demp_of(ddp, torch.optim.SGD(ddp.parameters(), lr=0.1))
    kill(model, 0, 1)
    demp.finish(windows())
    ddp.eval()
    with torch.no_grad():
        model[1].running_mean.fill_(rank)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        new = demp.rewrap(ddp, find_unused_parameters=False)
    assert (model[1].running_mean == rank).all(), "buffers are each rank's own, as they were"
    assert not new.training
    assert new.broadcast_buffers is False
    assert new.gradient_as_bucket_view is True
    assert new.find_unused_parameters is False
    assert new.bucket_bytes_cap == ddp.bucket_bytes_cap
    assert new.process_group is ddp.process_group
    with pytest.raises(ValueError, match="another model"):
        demp.rewrap(DistributedDataParallel(mlp()))


def test_the_new_wrapper_has_the_old_ones_settings(workers: Workers) -> None:
    workers.run(rank_settings)


def rank_errors(rank: int) -> list[str]:
    """What goes wrong on rank 1 alone raises on both, and nothing changes on either."""
    demp, model, optimizer, ddp = build(rank, noise_std=0.0)
    kill(model, 0, 1)
    for number in range(4):
        step(rank, ddp, optimizer, number)
    said = []

    def refused(batches: Any) -> None:
        before, live = everything(model, optimizer), demp.live()
        with pytest.raises((RuntimeError, OSError, TypeError)) as error:
            demp.step(batches)
        said.append(str(error.value))
        assert same(everything(model, optimizer), before)
        assert same(demp.live(), live)
        assert demp.due

    bad = inputs(5000)
    bad[3, 2] = float("nan")
    refused([inputs(5000) if rank == 0 else bad])
    refused(windows() if rank == 0 else 7)
    assert demp.step(windows()).layers["0"].cut == 1
    agree(model)
    return said


def test_an_error_on_one_rank_is_one_on_all(workers: Workers) -> None:
    said_0, said_1 = workers.run(rank_errors)
    assert all("another rank failed" in text for text in said_0)
    assert "not finite" in said_1[0]
    assert "batches=7" in said_1[1]


def rank_rollback(rank: int) -> str:
    """The outputs change on the window of rank 0 only: both take the cut back."""
    demp, model, optimizer, ddp = build(rank, noise_std=0.0)
    step(rank, ddp, optimizer, 0)
    kill(model, 0, 2)
    demp.observe(windows())
    alive_on_one_rank(model)
    demp._inputs = only(rank)
    kill(model, 0, 5)
    before, parameters = everything(model, optimizer), list(model.parameters())
    with pytest.raises(RuntimeError) as error:
        demp.cut()
    assert same(everything(model, optimizer), before)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    agree(model)
    assert demp.rewrap(ddp) is ddp
    step(rank, ddp, optimizer, 1)
    agree(model)
    revive(model, 0, 2)
    return str(error.value)


def test_a_cut_taken_back_on_one_rank_is_taken_back_on_all(workers: Workers) -> None:
    said_0, said_1 = workers.run(rank_rollback)
    assert "the cut changes an output" in said_0
    assert "another rank failed" in said_1


def rank_disagree(rank: int) -> None:
    demp, model, optimizer, _ = build(rank, seed=rank)
    before = everything(model, optimizer)
    with pytest.raises(RuntimeError, match=r"ranks differ in seed"):
        demp.finish(windows())
    assert same(everything(model, optimizer), before)


def test_ranks_with_other_seeds_are_refused_before_a_cut(workers: Workers) -> None:
    workers.run(rank_disagree)


def rank_resume(rank: int) -> None:
    demp, model, optimizer, ddp = build(rank)
    kill(model, 0, 1)
    for number in range(6):
        step(rank, ddp, optimizer, number)
        if demp.step(windows()) is not None:
            ddp = demp.rewrap(ddp)
    saved = copy.deepcopy((demp.state_dict(), model.state_dict(), optimizer.state_dict()))
    again, other, theirs, wrapped = build(rank)
    for state, o in zip(saved, (again, other, theirs), strict=True):
        o.load_state_dict(state)
    wrapped = again.rewrap(wrapped)
    for number in range(6, 10):
        for d, o, w in ((demp, optimizer, ddp), (again, theirs, wrapped)):
            step(rank, w, o, number)
            d.step(windows())
        ddp, wrapped = demp.rewrap(ddp), again.rewrap(wrapped)
    assert same(everything(model)["model"], everything(other)["model"])
    agree(model)


def test_resuming(workers: Workers) -> None:
    workers.run(rank_resume)


def rank_fsdp(rank: int) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = mlp(dtype=torch.float32)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError) as error:
        torsion.DemP(model, optimizer, torch.randn(4, INPUTS), total_steps=5)
    assert not optimizer._optimizer_step_pre_hooks
    return str(error.value)


def test_fsdp_is_refused_by_name(workers: Workers) -> None:
    for text in workers.run(rank_fsdp):
        assert "FSDP" in text
        assert "DistributedDataParallel" in text
