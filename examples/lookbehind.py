"""Lookbehind around SGD in a plain training loop.

python examples/lookbehind.py
"""

import torch
from torch import nn

import torsion


def main(epochs: int = 10) -> float:
    """Train a small classifier of points in and outside a circle; return the accuracy on new ones."""
    torch.manual_seed(0)
    points = torch.randn(1024, 2)
    labels = (points.square().sum(1) > 1.4).long()
    model = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 2))

    base = torch.optim.SGD(model.named_parameters(), lr=0.1, momentum=0.9)
    optimizer = torsion.Lookbehind(base, k=5, rho=0.05, alpha=0.5)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)

    for epoch in range(epochs):
        for batch in torch.randperm(len(points)).split(128):

            def closure(batch: torch.Tensor = batch) -> torch.Tensor:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(points[batch]), labels[batch])
                loss.backward()
                return loss

            loss = optimizer.step(closure)  # k + 1 evaluations of this minibatch; the loss at the slow weights
        scheduler.step()
        print(f"epoch {epoch + 1:2}: loss {loss:.3f}")

    new = torch.randn(1024, 2)
    accuracy = (model(new).argmax(1) == (new.square().sum(1) > 1.4)).float().mean().item()
    print(f"accuracy on new points {accuracy:.1%}")
    return accuracy


if __name__ == "__main__":
    main()
