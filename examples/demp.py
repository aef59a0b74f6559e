"""DemP in a plain training loop: the network ends smaller, its steps faster, its outputs as they were.

python examples/demp.py
"""

import torch
from torch import nn

import torsion


def batches(points: torch.Tensor, labels: torch.Tensor, epochs: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    picks = [batch for _ in range(epochs) for batch in torch.randperm(len(points)).split(128)]
    return [(points[pick], labels[pick]) for pick in picks]


def main(epochs: int = 150) -> tuple[float, float]:
    """Train a classifier of points in and outside a circle; return accuracy and part of the parameters left."""
    torch.manual_seed(0)
    points = torch.randn(1024, 2)
    labels = (points.square().sum(1) > 1.4).long()
    model = nn.Sequential(
        nn.Linear(2, 256), nn.BatchNorm1d(256), nn.ReLU(),
        nn.Linear(256, 256), nn.BatchNorm1d(256), nn.ReLU(),
        nn.Linear(256, 2),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    loader = batches(points, labels, epochs)

    # The lasso sets how small the network gets; it acts on the scales of the normalizations.
    demp = torsion.DemP(model, optimizer, points[:8], total_steps=len(loader), lasso=5e-3, prune_every=200)
    for inputs, targets in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets)
        loss.backward()
        optimizer.step()  # lasso and noise act in here
        report = demp.step(points.split(256))
        if report is not None:
            print(f"step {demp.steps_taken:4}: loss {loss:.3f}, parameters {report.parameters_after}")
    report = demp.finish(points.split(256))
    print(report)

    model.eval()
    new = torch.randn(1024, 2)
    accuracy = (model(new).argmax(1) == (new.square().sum(1) > 1.4)).float().mean().item()
    left = sum(p.numel() for p in model.parameters()) / (2 * 256 + 256 + 256 * 256 + 256 + 4 * 256 + 256 * 2 + 2)
    print(f"accuracy on new points {accuracy:.1%} with {left:.1%} of the parameters")
    return accuracy, left


if __name__ == "__main__":
    main()
