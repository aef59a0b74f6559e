"""Lookbehind with gradient accumulation: every phase sums the gradients of the same micro-batches.

python examples/lookbehind_accumulation.py
"""

import torch
from torch import nn

import torsion
from torsion.optim import bn_first_pass_only


def main(steps: int = 100) -> float:
    """Fit a small network with BatchNorm to a sine; return the last loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 1))

    k = 3
    base = torch.optim.SGD(model.named_parameters(), lr=0.01, momentum=0.9)
    optimizer = torsion.Lookbehind(base, k=k, rho=0.02)

    def accumulate(micro_batches: tuple[torch.Tensor, ...]) -> float:
        optimizer.zero_grad()
        total = 0.0
        for x in micro_batches:
            loss = nn.functional.mse_loss(model(x), x.sin()) / len(micro_batches)
            loss.backward()
            total += loss.item()
        return total

    # BatchNorm statistics then come from the slow weights only, once per micro-batch.
    with bn_first_pass_only(model):
        for step in range(steps):
            micro_batches = (torch.rand(256, 1) * 6 - 3).split(64)
            first = accumulate(micro_batches)
            optimizer.ascent_step()
            for _ in range(k):
                accumulate(micro_batches)
                optimizer.descent_step()
            if step % 20 == 19:
                print(f"step {step + 1}: loss {first:.4f}")

    print(
        f"BatchNorm saw {model[1].num_batches_tracked} batches in {steps} steps of {len(micro_batches)} micro-batches"
    )
    return first


if __name__ == "__main__":
    main()
