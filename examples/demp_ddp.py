"""DemP with DistributedDataParallel: every process cuts the same units, then wraps the model anew.

torchrun --nproc-per-node 2 examples/demp_ddp.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import torsion


def main(steps: int = 1000) -> int:
    """Train on half of the points each; return how many parameters are left."""
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    points = torch.randn(2048, 2)
    labels = (points.square().sum(1) > 1.4).long()
    points, labels = points[rank::world].to(device), labels[rank::world].to(device)

    network = nn.Sequential(nn.Linear(2, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 2)).to(device)
    model = DistributedDataParallel(network, device_ids=[rank] if device.type == "cuda" else None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    demp = torsion.DemP(model, optimizer, points[:8], total_steps=steps, lasso=5e-3, prune_every=200)
    for step in range(steps):
        picks = torch.randint(len(points), (64,), generator=torch.Generator().manual_seed(step * world + rank))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(points[picks]), labels[picks]).backward()
        optimizer.step()
        # Each process looks at its own points: a unit that is alive on one of them lives on all.
        report = demp.step(points.split(256))
        if report is not None:
            model = demp.rewrap(model)
            if rank == 0:
                print(f"step {step + 1}: {report.parameters_after} parameters")
    left = demp.finish(points.split(256)).parameters_after
    if rank == 0:
        print(f"{left} parameters left of {2 * 256 + 256 + 2 * 256 + 256 * 2 + 2}")
    dist.destroy_process_group()
    return left


if __name__ == "__main__":
    main()
