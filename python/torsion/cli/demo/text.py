"""The `text` task: a byte-level GPT on the source of the Python standard library found on this machine."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import platform
import sysconfig
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torsion.cli.demo.tasks import Batch, Data, Metric, Task
from torsion.cli.usage import UsageError

__all__ = ["GPT", "SHORT", "TEXT", "TextTask", "standard_library_files"]

_CONTEXT = 128
_BATCH = 8
_BYTES_AT_MOST = 4_000_000  # several times what a default run reads
_HELD_OUT_WINDOWS = 192  # 24 KiB, the same for every run: enough to tell 0.01 bit apart, cheap enough to do often
_SKIPPED = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def standard_library_files(root: Path) -> list[Path]:
    """The .py files below `root` that are the library itself, in an order that depends on their names alone."""
    files = [path for path in root.rglob("*.py") if not _SKIPPED.intersection(path.relative_to(root).parts)]
    # Ordered by checksum: a size cap then takes a sample of the whole library, not the packages from A to D.
    return sorted(files, key=lambda path: (_checksum(path, root), path.relative_to(root).as_posix()))


def _checksum(path: Path, root: Path) -> int:
    return zlib.crc32(path.relative_to(root).as_posix().encode())


def _read(root: Path) -> dict[str, bytes]:
    # Split by file, so that no held-out byte has a neighbour in the training part.
    parts: dict[str, list[bytes]] = {"training": [], "tuning": [], "validation": []}
    total = 0
    for path in standard_library_files(root):
        try:
            content = path.read_bytes()
        except OSError:
            continue
        if total + len(content) > _BYTES_AT_MOST:
            continue
        total += len(content)
        tenth = _checksum(path, root) % 10
        parts["validation" if tenth == 0 else "tuning" if tenth == 1 else "training"].append(content)
    joined = {name: b"\n".join(contents) for name, contents in parts.items()}
    if min(len(content) for content in joined.values()) <= _CONTEXT * _HELD_OUT_WINDOWS:
        raise UsageError(
            f"--task text: no usable .py files of the standard library in {root} (a zipped or stripped Python?); "
            "use --task digits or another Python"
        )
    return joined


class _Text(Data):
    def __init__(self, device: torch.device, tuning: bool) -> None:
        parts = _read(Path(sysconfig.get_path("stdlib")))
        held_out = parts["tuning" if tuning else "validation"]
        self._train = torch.frombuffer(bytearray(parts["training"]), dtype=torch.uint8).to(device)
        windows = torch.frombuffer(bytearray(held_out), dtype=torch.uint8)
        starts = torch.arange(_HELD_OUT_WINDOWS) * ((len(windows) - _CONTEXT - 1) // _HELD_OUT_WINDOWS)
        held_out_windows = windows[starts[:, None] + torch.arange(_CONTEXT + 1)].long()
        self._held_out = held_out_windows.view(-1, _BATCH, _CONTEXT + 1).to(device)
        self._window = torch.arange(_CONTEXT + 1)
        self.facts = {
            "data": f"source files of the standard library of Python {platform.python_version()}",
            "split": "by file, fixed",
            "training bytes": len(parts["training"]),
            "held-out bytes": _HELD_OUT_WINDOWS * _CONTEXT,
            "batch": f"{_BATCH} windows of {_CONTEXT} bytes",
            # Another Python has another library: equal digests are what makes two records comparable.
            "sha256": hashlib.sha256(b"".join(parts.values())).hexdigest(),
        }

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            starts = torch.randint(len(self._train) - _CONTEXT, (_BATCH, 1), generator=generator)
            windows = self._train[(starts + self._window).to(self._train.device)].long()
            yield windows[:, :-1], windows[:, 1:]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        inputs, targets = batch
        return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module, seed: int, brief: bool = False) -> dict[str, float]:
        model.eval()
        losses = [self.loss(model, (part[:, :-1], part[:, 1:])) for part in self._held_out]
        model.train()
        loss = torch.stack(losses).double().mean().item()
        return {"bits per byte": loss / math.log(2), "loss": loss}


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, hidden: int, activation: nn.Module) -> None:
        super().__init__()
        self.heads, self.activation = heads, activation
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3 * self.heads, -1)).transpose(1, 2).chunk(3, dim=1)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        down: Tensor = self.down(self.activation(self.up(self.norm2(x))))
        return x + down


def _gelu(units: int) -> nn.Module:
    return nn.GELU()


class GPT(nn.Module):
    """A byte-level GPT: bytes [batch, context] of int64 -> scores [batch, context, 256].

    Args:
        layers: blocks of attention and feed-forward network.
        width: of the residual stream.
        heads: of the attention.
        hidden: units of the feed-forward network, in multiples of the width.
        activation: makes, for so many units, what stands behind them.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        hidden: int = 4,
        activation: Callable[[int], nn.Module] = _gelu,
    ) -> None:
        super().__init__()
        units = hidden * width
        self.token, self.position = nn.Embedding(256, width), nn.Embedding(_CONTEXT, width)
        self.blocks = nn.Sequential(*(_Block(width, heads, units, activation(units)) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)
        for name, weight in self.named_parameters():
            if weight.dim() == 2:  # GPT-2's scheme: what writes into the residual stream starts smaller
                shrink = math.sqrt(2 * layers) if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(weight, std=0.02 / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)

    def forward(self, inputs: Tensor) -> Tensor:
        """The scores of the byte that follows each one."""
        x = self.token(inputs) + self.position.weight[: inputs.shape[1]]
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def _small() -> nn.Module:
    return GPT(layers=4, width=160, heads=4)


@dataclass(frozen=True)
class TextTask(Task):
    """A language model on Python's own source; `build` makes it."""

    build: Callable[[], nn.Module] = _small

    def load(self, device: torch.device, tuning_fold: int | None = None) -> Data:
        """The data, see `Task.load`."""
        return _Text(device, tuning=tuning_fold is not None)  # files enough for one fold

    def model(self) -> nn.Module:
        """A new model, see `Task.model`."""
        return self.build()


TEXT = TextTask(
    name="text",
    summary="Python's own source, byte-level GPT",
    extra_modules=(),
    metrics=(
        Metric("bits per byte", "validation bits per byte", "bits", higher_is_better=False, digits=3),
        Metric("loss", "validation loss", "nats", higher_is_better=False, digits=4),
    ),
    choose_by="loss",
    steps=800,
    seeds=1,
    warmup=100,
    threads=1,
    tuning_seeds=2,
)

# Three times as many gradients a step for one of the arms: a shorter run, so that it stays one of a few minutes.
SHORT = dataclasses.replace(TEXT, name="text-short", variant_of="text", steps=300, evaluations=10)
