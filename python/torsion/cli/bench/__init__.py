"""`torsion bench`: time the kernels of this machine against what you would run instead.

Every contestant first computes a few steps on the very tensors it is timed on and must agree with a float64
reference; if one does not, nothing is reported and the exit code is 1. Ratios are medians over interleaved rounds.
Lookbehind and SAM take whole cycles: on the lists without the time of their gradients, on a small network with it.
`masked` and `demp` time layers and networks, forward and backward; --list says nothing to them. At
one thread the clock is processor time, which other work disturbs little; at more it is wall time: keep it quiet then.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from torsion.cli.bench import cuda, layers, network, overhead, pruning, record, report, suite
from torsion.cli.bench.comparisons import METHODS
from torsion.cli.bench.figures import Figure, Place
from torsion.cli.bench.gate import GateError
from torsion.cli.bench.lists import LISTS
from torsion.cli.usage import UsageError, integer_from, require_extra, resolve_device

__all__ = ["add_arguments", "run"]

_FAILED, _INTERRUPTED = 1, 130


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `torsion bench`."""
    parser.description, parser.epilog = (__doc__ or "").split("\n")[0], (__doc__ or "").split("\n", 1)[1]
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    # Not `choices`: with nargs="*" argparse of Python 3.10 refuses the empty list.
    add("methods", metavar="|".join(METHODS), nargs="*", help="what to time (default: everything)")
    add("--list", dest="lists", choices=list(LISTS), action="append", help="tensors; may be repeated (default: all)")
    add("--threads", metavar="N", type=integer_from(1, 1024, 2), help="CPU threads (default: torch's own choice)")
    add("--rounds", metavar="N", type=integer_from(1, 10**6, 20), default=20, help="rounds that count (default: 20)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto takes a GPU when there is one")
    add("--json", metavar="FILE", type=Path, help="write a record: figures and the environment they came from")
    add("--plot", metavar="FILE", type=Path, help="draw the ratios (PNG, SVG or PDF)")


def run(args: argparse.Namespace) -> int:
    """Check everything that can be refused, then measure, then report whatever was done."""
    for method in args.methods:
        if method not in METHODS:
            raise UsageError(f"'{method}' is nothing to time; choose from {', '.join(METHODS)}")
    device = resolve_device(args.device)
    if args.plot is not None:
        require_extra("bench", {"matplotlib": "matplotlib"})
        _plottable(args.plot)
    for flag, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None:
            _writable(flag, path)
    before = torch.get_num_threads()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        return _run(args, Place(device, torch.get_num_threads(), args.rounds))
    finally:
        torch.set_num_threads(before)


def _run(args: argparse.Namespace, place: Place) -> int:
    if "OMP_WAIT_POLICY" in os.environ:
        print("torsion bench: OMP_WAIT_POLICY is set; it can slow torch's kernels down thirtyfold", file=sys.stderr)
    facts, code = record.environment(place), 0
    figures: list[Figure] = []
    try:
        for figure in _measure(args, place):
            figures.append(figure)
    except GateError as error:
        print(f"torsion bench: {error}", file=sys.stderr)
        return _FAILED
    except KeyboardInterrupt:
        code = _INTERRUPTED
    if hasattr(os, "getloadavg"):
        facts["load average at end"] = os.getloadavg()
    print(report.render(figures, facts, place))
    if args.json is not None:
        record.write_json(args.json, facts, place, figures)
    if args.plot is not None:
        report.write_plot(args.plot, figures, facts, place)
    return code


def _measure(args: argparse.Namespace, place: Place) -> Iterator[Figure]:
    methods = list(dict.fromkeys(args.methods)) or list(METHODS)
    on_lists = any(method not in ("masked", "demp") for method in methods)
    for name in dict.fromkeys(args.lists or LISTS) if on_lists else ():
        tensors = LISTS[name]
        yield from suite.run_list(tensors, methods, place, _progress)
        if place.device.type == "cuda":
            with _progress(f"{name}: host time"):
                yield from cuda.host_figures(tensors, methods, place, suite.LR)
        with _progress(f"{name}: memory"):
            yield from overhead.memory_figures(tensors, methods, place)
    if "lookbehind" in methods:
        with _progress("digits network: whole cycles"):
            yield from network.network_figures(place)
    if "masked" in methods:
        with _progress("masked layers"):
            yield from layers.masked_figures(place)
    if "demp" in methods:
        with _progress("pruning"):
            yield from pruning.demp_figures(place)
    with _progress("import time"):
        yield overhead.import_figure(place)


@contextlib.contextmanager
def _progress(title: str) -> Iterator[None]:
    begin = time.perf_counter()
    print(f"{title} ...", file=sys.stderr, flush=True)
    yield
    print(f"  {time.perf_counter() - begin:.1f} s", file=sys.stderr, flush=True)


def _plottable(path: Path) -> None:
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {path}: the ending says the format; give .png, .svg or .pdf")


def _writable(flag: str, path: Path) -> None:
    """Prove that a file can be written before minutes are spent on what goes into it."""
    existed = path.exists()
    try:
        with path.open("a"):
            pass
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UsageError(
            f"{flag} {path}: cannot write there ({reason}); give a file in an existing directory"
        ) from None
    if not existed:
        path.unlink()
