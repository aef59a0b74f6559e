"""The `digits` task: 1,797 real handwritten digits of 8x8 pixels, and a small convolutional network."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torsion.cli.demo.tasks import Batch, Data, Metric, Task

__all__ = ["DIGITS"]

_BATCH = 32
_SPLIT_SEED = 0  # the split is the same for every seed of a run, so that seeds differ in the training alone
_TEST_SHARE = 0.5  # large, because the result is a count of images got wrong
_FOLDS = 5  # of the training part; a rate is judged by cross-validation, because one fold is only 180 images


class _Digits(Data):
    def __init__(self, device: torch.device, tuning_fold: int | None) -> None:
        # Imported by name: scikit-learn carries no types, and is needed by this task alone.
        load_digits = importlib.import_module("sklearn.datasets").load_digits
        selection = importlib.import_module("sklearn.model_selection")
        pixels, labels = load_digits(return_X_y=True)
        train, held_out = selection.train_test_split(
            range(len(labels)), test_size=_TEST_SHARE, stratify=labels, random_state=_SPLIT_SEED
        )
        if tuning_fold is not None:
            folds = selection.StratifiedKFold(_FOLDS, shuffle=True, random_state=_SPLIT_SEED)
            parts = list(folds.split(train, labels[train]))[tuning_fold % _FOLDS]
            train, held_out = ([train[index] for index in part] for part in parts)
        images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16  # pixels are 0..16
        mean, std = images[train].mean(), images[train].std()
        self._images = ((images - mean) / std).to(device)
        self._labels = torch.tensor(labels, dtype=torch.int64).to(device)
        self._train, self._held_out = torch.tensor(train), torch.tensor(held_out).to(device)
        self.facts = {
            "data": "handwritten digits bundled with scikit-learn (8x8 pixels)",
            "split": "stratified, fixed" if tuning_fold is None else f"{_FOLDS} stratified folds of the training part",
            "training examples": len(train),
            "held-out examples": len(held_out),
            "batch": _BATCH,
        }

    def batches(self, seed: int) -> Iterator[Batch]:
        # Drawn on the CPU, so that the order is the same on every device; a short last batch is dropped.
        generator = torch.Generator().manual_seed(seed)
        while True:
            order = self._train[torch.randperm(len(self._train), generator=generator)].to(self._labels.device)
            for chosen in order[: len(order) // _BATCH * _BATCH].view(-1, _BATCH):
                yield self._images[chosen], self._labels[chosen]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> dict[str, float]:
        model.eval()
        labels = self._labels[self._held_out]
        scores = model(self._images[self._held_out])
        model.train()
        return {
            "accuracy": 100 * (scores.argmax(1) == labels).double().mean().item(),
            "loss": F.cross_entropy(scores, labels).item(),
        }


def _block(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


@dataclass(frozen=True)
class _DigitsTask(Task):
    def load(self, device: torch.device, tuning_fold: int | None = None) -> Data:
        return _Digits(device, tuning_fold)

    def model(self) -> nn.Module:
        return nn.Sequential(
            *_block(1, 32),
            *_block(32, 32),
            nn.MaxPool2d(2),
            *_block(32, 64),
            *_block(64, 64),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


DIGITS = _DigitsTask(
    name="digits",
    summary="handwritten digits, small ConvNet with BatchNorm",
    extra_modules=(("sklearn", "scikit-learn"),),
    metrics=(
        Metric("accuracy", "test accuracy", "%", higher_is_better=True, digits=2),
        Metric("loss", "test loss", "nats", higher_is_better=False, digits=4),
    ),
    choose_by="loss",
    steps=400,
    seeds=5,
    warmup=20,
    threads=1,
)
