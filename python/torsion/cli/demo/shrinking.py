"""The networks that `torsion demo --method demp` shrinks, and its tasks; `torsion bench demp` trains the first as well.

DemP's lasso acts on normalization scales, so that every unit which is to die has one, between its weights and its ReLU:
here a BatchNorm each. The scores, the attention and the residual stream of the transformer are never cut.
"""

from __future__ import annotations

import dataclasses

import torch.nn.functional as F
from torch import Tensor, nn

from torsion.cli.demo.digits import DIGITS, conv_block
from torsion.cli.demo.text import GPT, TEXT

__all__ = ["CONVOLUTIONAL", "PERCEPTRON", "TRANSFORMER", "NormedReLU", "convolutional", "perceptron", "transformer"]


def convolutional(width: int = 64, classes: int = 10) -> nn.Sequential:
    """Four 3x3 convolutions, two of `width` channels and two of twice as many; images [N, 1, H, W] -> scores.

    At the default width a step on 64 digits takes some twenty milliseconds of one core, nearly all of it in the
    convolutions, and hardly less than the overhead of a step remains when most channels are gone.
    """
    return nn.Sequential(
        *conv_block(1, width),
        *conv_block(width, width),
        nn.MaxPool2d(2),
        *conv_block(width, 2 * width),
        *conv_block(2 * width, 2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, classes),
    )


def perceptron(width: int = 1024, inputs: int = 64, classes: int = 10) -> nn.Sequential:
    """An MLP with two hidden layers; [N, ...] with `inputs` values each -> scores [N, classes]."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(inputs, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
        *(nn.Linear(width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()),
        nn.Linear(width, classes),
    )


class NormedReLU(nn.Module):
    """BatchNorm and ReLU over the last dimension of [batch, context, units].

    Args:
        units: how many.
        scale: what the BatchNorm's scales start at. AdamW moves a parameter by at most its rate per step, so within a
            few hundred steps no lasso brings a scale from 1 to 0. From 0.2 it does; the dense network is as good.
    """

    def __init__(self, units: int, scale: float = 0.2) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(units)
        nn.init.constant_(self.norm.weight, scale)

    def forward(self, x: Tensor) -> Tensor:
        """The activations, shaped as `x`."""
        return F.relu(self.norm(x.flatten(0, 1)).view_as(x))


def transformer(layers: int = 4, width: int = 96, hidden: int = 8) -> nn.Module:
    """A byte-level GPT whose feed-forward networks have BatchNorm and ReLU on `hidden` times `width` units."""
    return GPT(layers, width, heads=4, hidden=hidden, activation=NormedReLU)


CONVOLUTIONAL = dataclasses.replace(
    DIGITS,
    name="digits-convolutional",
    variant_of="digits",
    summary="handwritten digits, convolutional network with BatchNorm",
    network="convolutional network",
    build=convolutional,
    batch=64,
    choose_by="accuracy",
    tolerance=0.25,
    steps=400,
    seeds=3,
    evaluations=12,
)

PERCEPTRON = dataclasses.replace(
    CONVOLUTIONAL,
    name="digits-mlp",
    summary="handwritten digits, MLP with BatchNorm",
    network="MLP",
    build=perceptron,
)

TRANSFORMER = dataclasses.replace(
    TEXT,
    name="text-relu",
    variant_of="text",
    summary="Python's own source, byte-level GPT with BatchNorm and ReLU in its feed-forward networks",
    network="transformer",
    build=transformer,
    choose_by="bits per byte",
    tolerance=0.05,
    steps=300,
    warmup=30,
    evaluations=6,
)
