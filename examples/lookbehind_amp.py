"""Lookbehind with autocast to float16 and torch's GradScaler: explicit phases in place of a closure.

python examples/lookbehind_amp.py
"""

import torch
from torch import nn

import torsion


def main(steps: int = 100) -> float:
    """Fit a small network to a sine; return the last loss."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 1)).to(device)

    k = 3
    base = torch.optim.SGD(model.named_parameters(), lr=0.01, momentum=0.9)
    optimizer = torsion.Lookbehind(base, k=k, rho=0.02)
    scaler = torch.amp.GradScaler(device)

    for step in range(steps):
        x = torch.rand(256, 1, device=device) * 6 - 3

        def loss(x: torch.Tensor = x) -> torch.Tensor:
            with torch.autocast(device, torch.float16):
                return nn.functional.mse_loss(model(x).float(), x.sin())

        optimizer.zero_grad()
        first = loss()
        scaler.scale(first).backward()
        scaler.unscale_(optimizer)
        optimizer.ascent_step()
        scaler.update()  # unscale_ may run once per update
        for _ in range(k):
            optimizer.zero_grad()
            scaler.scale(loss()).backward()
            scaler.unscale_(optimizer)
            optimizer.descent_step()
            scaler.update()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {first:.4f}, scale {scaler.get_scale():.0f}")

    print(f"skipped for an overflow: {optimizer.skipped_steps()} of {steps} steps")
    return first.item()


if __name__ == "__main__":
    main()
