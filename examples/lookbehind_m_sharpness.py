"""Lookbehind with m-sharpness: each process ascends by the gradient of its own part of the batch, all descend together.

python examples/lookbehind_m_sharpness.py           two processes on this machine
torchrun --nproc-per-node=N examples/lookbehind_m_sharpness.py
"""

import os
import subprocess
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import torsion


def found_anywhere(model: nn.Module) -> torch.Tensor:
    """1.0 if a local gradient on any rank is not finite, else 0.0: all ranks then give up the step together."""
    norms = torch._foreach_norm([p.grad for p in model.parameters() if p.grad is not None])
    found = (~torch.isfinite(torch.stack(norms)).all()).float()
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return found


def train(steps: int = 100) -> float:
    """Fit a small network to a sine in every process; return the last loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1))
    parallel = DistributedDataParallel(model)

    k = 2
    base = torch.optim.SGD(model.named_parameters(), lr=0.01, momentum=0.9)
    # The ascent's gradient is another one than the descent's, so none can be reused: 2k evaluations.
    optimizer = torsion.Lookbehind(base, k=k, rho=0.02, reuse_gradients=False)

    torch.manual_seed(1 + dist.get_rank())
    for step in range(steps):
        x = torch.rand(64, 1) * 6 - 3
        for i in range(k):
            optimizer.zero_grad()
            with parallel.no_sync():  # the local gradient
                loss = nn.functional.mse_loss(parallel(x), x.sin())
                loss.backward()
            optimizer.ascent_step(found_inf=found_anywhere(model))
            if i == 0:
                first = loss.item()

            optimizer.zero_grad()
            nn.functional.mse_loss(parallel(x), x.sin()).backward()  # the average over the ranks
            optimizer.descent_step()
        if step % 20 == 19 and dist.get_rank() == 0:
            print(f"step {step + 1}: loss of rank 0 {first:.4f}")

    for p in model.parameters():
        other = p.detach().clone()
        dist.broadcast(other, src=0)
        if not torch.equal(p, other):
            raise RuntimeError("the ranks have parted")
    if dist.get_rank() == 0:
        print(f"{dist.get_world_size()} ranks hold the same weights, bit for bit")
    return first


def main() -> None:
    """Train in the processes that torchrun started, or have it start two."""
    if "RANK" not in os.environ:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", __file__]
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        return
    dist.init_process_group("gloo")
    train()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
