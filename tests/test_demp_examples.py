"""The examples of DemP run, shortened, and do what they say."""

from __future__ import annotations

import argparse
import json
import pickle
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

EXAMPLES = Path(__file__).parents[1] / "examples"


def loaded(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))


def test_plain_loop(capsys: pytest.CaptureFixture[str]) -> None:
    accuracy, left = loaded("demp")["main"](epochs=60)
    assert accuracy > 0.9
    assert left < 0.5
    assert "step  200: loss" in capsys.readouterr().out


def test_distributed_in_one_process(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """With two: test_demp_distributed.py."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    store = dist.HashStore()
    start = dist.init_process_group
    monkeypatch.setattr(dist, "init_process_group", lambda kind: start(kind, store=store, rank=0, world_size=1))
    left = loaded("demp_ddp")["main"](steps=400)
    assert not dist.is_initialized()
    printed = capsys.readouterr().out
    assert "step 200" in printed
    assert f"{left} parameters left of 1794" in printed
    assert left < 1794


def vgg_arguments(**given: Any) -> argparse.Namespace:
    small = dict(
        data=None, steps=4, batch=16, width=2, hidden=8, lasso=1e-3, prune_every=2, images=40, device="cpu", seed=61,
        json=None,
    )  # fmt: skip
    return argparse.Namespace(**{**small, **given})


def test_vgg_on_the_synthetic_set_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = tmp_path / "course.json"
    course = loaded("demp_vgg")["main"](vgg_arguments(json=record))
    assert [point["step"] for point in course] == [2, 4]
    assert all(0 < point["parameters"] <= 1 for point in course)
    printed = capsys.readouterr().out
    assert printed.count("SYNTHETIC SET of CIFAR-10's shape, not CIFAR-10") == 2
    assert "largest difference of an output" in printed
    written = json.loads(record.read_text())
    assert written["data"].startswith("SYNTHETIC")
    assert written["course"] == course


def test_vgg_on_a_folder_of_cifar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files laid out as those of CIFAR-10 for Python: rows of 3072 bytes, red, green and blue planes, labels."""
    rng = np.random.default_rng(0)
    names = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]
    for i, name in enumerate(names):
        data = rng.integers(0, 256, (8, 3072), dtype=np.uint8)
        data[:, :1024] = i  # the red plane tells the file
        labels = [(i + j) % 10 for j in range(8)]
        (tmp_path / name).write_bytes(pickle.dumps({b"data": data, b"labels": labels}))
    module = loaded("demp_vgg")
    images, labels, test_images, test_labels = module["cifar10"](tmp_path)
    assert images.shape == (40, 3, 32, 32)
    assert test_images.shape == (8, 3, 32, 32)
    assert images[:, 0, 5, 7].tolist() == [i for i in range(5) for _ in range(8)]
    assert labels[8:11].tolist() == [1, 2, 3]
    assert test_labels[0] == 5
    module["main"](vgg_arguments(data=tmp_path, steps=2))
    assert f"CIFAR-10 from {tmp_path}: 40 images to train on, 8 to test" in capsys.readouterr().out


def test_vgg_has_the_shape_of_the_authors_network() -> None:
    """64 to 512 channels and two hidden layers of 4096 with normalization; no dropout."""
    model = loaded("demp_vgg")["vgg16"](64, 4096)
    widths = [m.out_channels for m in model if isinstance(m, torch.nn.Conv2d)]
    assert widths == [64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]
    assert [m.out_features for m in model if isinstance(m, torch.nn.Linear)] == [4096, 4096, 10]
