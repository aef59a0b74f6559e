"""DemP on VGG-16 in the set-up of its authors' script for CIFAR-10 with Adam; wants a GPU.

python examples/demp_vgg.py --data FOLDER
    the folder with data_batch_1 ... test_batch of CIFAR-10 for Python; pickles: take them from a known place
python examples/demp_vgg.py --steps 50 --width 8 --hidden 64 --prune-every 10
    a synthetic set of the same shape: shows that it runs, no more

Of the authors: AdamW 5e-3, decay 5e-4, one-cycle rate, batch 256, 15,626 steps, noise 5e-5, lasso on normalization
scales, a cut every 1,000 steps after a window of 3 x 512 training images, running statistics of decay .999, unbiased,
reflected borders of 4, crops, flips, standardization of each image. Here, not theirs: row masks for the noise, and one
process on one device.
"""

import argparse
import json
import pickle
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, pad

import torsion

BLOCKS = [[1, 1], [2, 2], [4, 4, 4], [8, 8, 8], [8, 8, 8]]
"""Channels of the convolutions between poolings, in units of the width."""


def vgg16(width: int, hidden: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    channels = 3
    for block in BLOCKS:
        for factor in block:
            layers += [nn.Conv2d(channels, factor * width, 3, padding=1), nn.BatchNorm2d(factor * width), nn.ReLU()]
            channels = factor * width
        layers.append(nn.MaxPool2d(2))
    layers.append(nn.Flatten())
    for _ in range(2):
        layers += [nn.Linear(channels, hidden), nn.BatchNorm1d(hidden), nn.ReLU()]
        channels = hidden
    return nn.Sequential(*layers, nn.Linear(channels, 10))


def cifar10(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images ``[n, 3, 32, 32]`` uint8 and labels, for training and for testing."""

    def read(names: list[str]) -> tuple[Tensor, Tensor]:
        files = [pickle.loads((folder / name).read_bytes(), encoding="bytes") for name in names]
        images = torch.cat([torch.from_numpy(f[b"data"]).reshape(-1, 3, 32, 32) for f in files])
        return images, torch.tensor([label for f in files for label in f[b"labels"]])

    return *read([f"data_batch_{i}" for i in range(1, 6)]), *read(["test_batch"])


def synthetic(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten smooth patterns in noise, in the shape of CIFAR-10: no benchmark of anything."""
    patterns = nn.functional.interpolate(torch.randn(10, 3, 4, 4), size=32, mode="bilinear")

    def draw(count: int) -> tuple[Tensor, Tensor]:
        labels = torch.randint(10, (count,))
        images = 128 + 32 * patterns[labels] + 48 * torch.randn(count, 3, 32, 32)
        return images.clamp(0, 255).to(torch.uint8), labels

    return *draw(n), *draw(n // 5)


def standardized(images: Tensor) -> Tensor:
    images = images.float()
    mean = images.mean((1, 2, 3), keepdim=True)
    return (images - mean) / images.std((1, 2, 3), keepdim=True).clamp(min=1 / 3072**0.5)


def augmented(images: Tensor) -> Tensor:
    """Crops of the images with reflected borders, half of them mirrored."""
    n, device = len(images), images.device
    padded = pad(images.float(), (4, 4, 4, 4), mode="reflect")
    top, left = (torch.randint(9, (n, 1), device=device) for _ in range(2))
    along = torch.arange(32, device=device)
    columns = torch.where(torch.rand(n, 1, device=device) < 0.5, along, 31 - along) + left
    picture = torch.arange(n, device=device)[:, None, None]
    return padded[picture, :, (top + along)[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def endless(images: Tensor, labels: Tensor, batch: int) -> Iterator[tuple[Tensor, Tensor]]:
    while True:
        for pick in torch.randperm(len(images), device=images.device).split(batch):
            if len(pick) == batch:
                yield images[pick], labels[pick]


def unbiased_statistics(model: nn.Module, step: int, decay: float = 0.999) -> None:
    """Running statistics of this decay without the weight of their start, as in Haiku."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = (1 - decay) / (1 - decay ** (step + 1))


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    right = sum(
        (model(standardized(x)).argmax(1) == y).sum().item()
        for x, y in zip(images.split(512), labels.split(512), strict=True)
    )
    model.train()
    return right / len(labels)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10 for Python; without it the set is synthetic")
    parser.add_argument("--steps", type=int, default=15_626)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--lasso", type=float, default=1e-3, help="the authors ran 0 and 1e-6 to 1e-2; default 1e-3")
    parser.add_argument("--prune-every", type=int, default=1000)
    parser.add_argument("--images", type=int, default=5000, help="of the synthetic set")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=61)
    parser.add_argument("--json", type=Path, help="write the course of the run here")
    return parser.parse_args()


def main(args: argparse.Namespace) -> list[dict[str, float]]:
    torch.manual_seed(args.seed)
    label = f"CIFAR-10 from {args.data}" if args.data else "SYNTHETIC SET of CIFAR-10's shape, not CIFAR-10"
    sets = cifar10(args.data) if args.data else synthetic(args.images)
    images, labels, test_images, test_labels = (t.to(args.device) for t in sets)
    print(f"{label}: {len(images)} images to train on, {len(test_images)} to test; {args.device}")
    model = vgg16(args.width, args.hidden).to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=5e-4)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, args.steps, cycle_momentum=False)
    demp = torsion.DemP(
        model, optimizer, standardized(images[:8]), total_steps=args.steps, lasso=args.lasso,
        prune_every=args.prune_every, window=3, seed=args.seed,
    )  # fmt: skip
    window = (standardized(x) for x, _ in endless(images, labels, min(512, len(images))))
    before = sum(p.numel() for p in model.parameters())
    course, started, last = [], time.perf_counter(), 0
    for step, (x, y) in zip(range(args.steps), endless(images, labels, args.batch), strict=False):
        unbiased_statistics(model, step)
        optimizer.zero_grad()
        cross_entropy(model(standardized(augmented(x))), y).backward()
        optimizer.step()
        rates.step()
        report = demp.step(window)
        if step + 1 == args.steps:
            report = demp.finish(window)
        if report is not None:
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            each = (time.perf_counter() - started) / (step + 1 - last)
            found = {
                "step": step + 1,
                "accuracy": accuracy(model, test_images, test_labels),
                "parameters": report.parameters_after / before,
                "units": sum(layer.live for layer in report.layers.values()),
                "milliseconds": 1e3 * each,
            }
            course.append(found)
            print("  ".join(f"{k} {v:.4g}" for k, v in found.items()), flush=True)
            started, last = time.perf_counter(), step + 1
    print(f"{label}\n{report}\naccuracy {course[-1]['accuracy']:.2%}")
    if args.json:
        args.json.write_text(json.dumps({"data": label, "course": course}, indent=1))
    return course


if __name__ == "__main__":
    main(arguments())
