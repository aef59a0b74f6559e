"""What the commands share; above all that bad usage is one line on standard error and exit code 2."""

from __future__ import annotations

import argparse
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import torch

__all__ = [
    "Parser",
    "UsageError",
    "integer_from",
    "require_extra",
    "resolve_device",
    "usable_processors",
    "writable_directory",
]


class UsageError(Exception):
    """Bad usage found after the arguments were parsed; the message names the flag and the remedy."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that answers bad usage in one line, without the usage paragraph, and takes no abbreviations.

    Abbreviated flags would change their meaning the day a longer one is added.
    """

    def __init__(self, **options: Any) -> None:
        options.setdefault("allow_abbrev", False)
        super().__init__(**options)

    def error(self, message: str) -> NoReturn:
        """Print one line that names the flag, and exit with 2."""
        one_line = " ".join(message.split())
        self.exit(2, f"{self.prog}: error: {one_line.removeprefix('argument ')}\n")


def integer_from(lowest: int, highest: int, example: int) -> Callable[[str], int]:
    """An argparse type: an integer from `lowest` to `highest`, with `example` offered when it is not one."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is not an integer; try {example}") from None
        if value < lowest:
            raise argparse.ArgumentTypeError(f"{value} is too small; give at least {lowest}, for instance {example}")
        if value > highest:
            raise argparse.ArgumentTypeError(f"{value} is too large; give at most {highest}, for instance {example}")
        return value

    return parse


def require_extra(extra: str, modules: dict[str, str]) -> None:
    """Raise a UsageError that names the extra to install when a module is missing.

    Args:
        extra: the extra's name in torsion's own metadata.
        modules: importable name -> the distribution that brings it.
    """
    missing = [name for module, name in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UsageError(f"{', '.join(missing)} not installed; run: pip install 'torsion[{extra}]'")


def resolve_device(name: str) -> torch.device:
    """Turn `--device auto|cpu|cuda` into a device; `auto` takes the GPU when there is one."""
    if name == "cuda" and not torch.cuda.is_available():
        why = "this torch was built without CUDA" if torch.version.cuda is None else "torch sees no usable GPU"
        raise UsageError(f"--device cuda: {why}; use --device cpu or --device auto")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def usable_processors() -> int:
    """Processors this process may use, which in a container are fewer than the machine's."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def writable_directory(flag: str, path: Path) -> Path:
    """Make `path` and prove that files can be written there, before any work is done for them."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UsageError(f"{flag} {path}: cannot write there ({reason}); give a writable directory") from None
    return path
