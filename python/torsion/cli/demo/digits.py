"""The `digits` task: 1,797 real handwritten digits of 8x8 pixels, and a small convolutional network.

Its variant gives a part of the training images a wrong label, another part for each seed; what is held out stays right.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torsion.cli.demo.tasks import Batch, Data, Metric, Task, generator

__all__ = ["DIGITS", "WRONG_LABELS", "DigitsTask", "conv_block"]

_CLASSES = 10
_EVALUATED_AT_ONCE = 256  # all 899 leave the cache between two layers, which takes a quarter longer
_SPLIT_SEED = 0  # the split is the same for every seed of a run, so that seeds differ in the training alone
_TEST_SHARE = 0.5  # large, because the result is a count of images got wrong
_FOLDS = 5  # of the training part; a rate is judged by cross-validation, because one fold is only 180 images
_WRONG = 0.2


class _Digits(Data):
    def __init__(self, device: torch.device, tuning_fold: int | None, wrong: float, batch: int) -> None:
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
            "batch": batch,
        }
        self._batch = batch
        self._wrong = round(wrong * len(train))
        if wrong:
            self.facts["wrong labels"] = f"{self._wrong} of the training examples, drawn anew for each seed"

    def _given(self, seed: int) -> tuple[Tensor, Tensor]:
        """The labels that a run with this seed is trained on, and which of them are wrong."""
        draw = generator("wrong labels", seed)
        wrong = self._train[torch.randperm(len(self._train), generator=draw)[: self._wrong]]
        shift = torch.randint(1, _CLASSES, (len(wrong),), generator=draw)  # any other class, each as likely
        labels, wrong = self._labels.clone(), wrong.to(self._labels.device)
        labels[wrong] = (labels[wrong] + shift.to(labels.device)) % _CLASSES
        return labels, wrong

    def batches(self, seed: int) -> Iterator[Batch]:
        labels, _ = self._given(seed)
        # Drawn on the CPU, so that the order is the same on every device; a short last batch is dropped.
        shuffle = torch.Generator().manual_seed(seed)
        while True:
            order = self._train[torch.randperm(len(self._train), generator=shuffle)].to(self._labels.device)
            for chosen in order[: len(order) // self._batch * self._batch].view(-1, self._batch):
                yield self._images[chosen], labels[chosen]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels)

    @torch.no_grad()
    def evaluate(self, model: nn.Module, seed: int, brief: bool = False) -> dict[str, float]:
        model.eval()
        labels = self._labels[self._held_out]
        images = self._images[self._held_out]
        scores = torch.cat([model(part) for part in images.split(_EVALUATED_AT_ONCE)])
        result = {"accuracy": _percent(scores, labels), "loss": F.cross_entropy(scores, labels).item()}
        if self._wrong and not brief:
            given, wrong = self._given(seed)
            result["wrong labels learned"] = _percent(model(self._images[wrong]), given[wrong])
        model.train()
        return result


def _percent(scores: Tensor, labels: Tensor) -> float:
    return 100 * (scores.argmax(1) == labels).double().mean().item()


def conv_block(inputs: int, outputs: int) -> list[nn.Module]:
    """A 3x3 convolution of the same size, BatchNorm and ReLU."""
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def _small() -> nn.Module:
    return nn.Sequential(
        *conv_block(1, 32),
        *conv_block(32, 32),
        nn.MaxPool2d(2),
        *conv_block(32, 64),
        *conv_block(64, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, _CLASSES),
    )


@dataclass(frozen=True)
class DigitsTask(Task):
    """A network on the digits.

    Attributes:
        build: makes the network: images [N, 1, 8, 8] -> scores [N, 10].
        batch: images per step.
        wrong: share of the training images that get a wrong label.
    """

    build: Callable[[], nn.Module] = _small
    batch: int = 32
    wrong: float = 0.0

    def load(self, device: torch.device, tuning_fold: int | None = None) -> Data:
        """The data, see `Task.load`."""
        return _Digits(device, tuning_fold, self.wrong, self.batch)

    def model(self) -> nn.Module:
        """A new network, see `Task.model`."""
        return self.build()


DIGITS = DigitsTask(
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
    tuning_seeds=_FOLDS,
)

# What is reported is accuracy, and loss would choose differently: it punishes the doubt that a model rightly learns
# from wrong labels.
WRONG_LABELS = dataclasses.replace(
    DIGITS,
    name="digits-wrong-labels",
    variant_of="digits",
    summary=f"handwritten digits, {_WRONG:.0%} of the training labels wrong",
    metrics=(
        *(dataclasses.replace(metric, digits=digits) for metric, digits in zip(DIGITS.metrics, (1, 2), strict=True)),
        Metric("wrong labels learned", "wrong labels learned", "%", higher_is_better=False, digits=1),
    ),
    choose_by="accuracy",
    steps=180,
    evaluations=5,
    weight_noise=(0.1, 0.2, 0.3, 0.4),
    wrong=_WRONG,
)
