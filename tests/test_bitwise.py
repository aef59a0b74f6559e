"""Bit for bit: two runs, any number of threads, any instruction set; a run saved, copied or pickled goes on."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import digests
import pytest
import torch
from helpers import each_dtype, randoms, same_bits, snapshot, take_steps

import torsion
from torsion.ops import _native

CASES = [f"{method} {kind}" for method in digests.METHODS for kind in digests.KINDS]
each_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.replace(" ", "-"))

needs_cpu_module = pytest.mark.skipif(_native.C is None, reason=_native.missing.get("_C", ""))


@each_case
def test_two_runs_are_equal(case, compiled_target):
    def run():
        optimizer = moved(digests.build(*case.split(), backend=None), compiled_target)
        digests.advance(optimizer, 0, 3)
        return digests.digest(optimizer)

    assert run() == run()


def moved(optimizer, target):
    """The same optimizer with its parameters on the target and its back end."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.data = p.data.to(target.device)
    optimizer._backend = target.backend
    return optimizer


def test_two_runs_are_equal_on_every_back_end(target):
    start, gradients = randoms([(7,), (3, 5), ()]), [randoms([(7,), (3, 5), ()]) for _ in range(2)]
    runs = []
    for _ in range(2):
        params = [target.parameter(t, torch.float32) for t in start]
        optimizer = target.optimizer(torsion.AdaTAMW, params, lr=0.01, scope="tensor")
        take_steps(optimizer, gradients)
        runs.append(snapshot(optimizer))
    assert same_bits(*runs)


@pytest.fixture(scope="module")
def single() -> dict[str, str]:
    """Digests in this process with one thread and the best instruction set."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return digests.all_digests()
    finally:
        torch.set_num_threads(threads)


@needs_cpu_module
def test_one_and_two_threads_are_equal(single):
    torch.set_num_threads(2)
    assert digests.all_digests() == single


@needs_cpu_module
@pytest.mark.parametrize("level", ["0", "1", "2"], ids=["baseline", "x86-64-v3", "x86-64-v4"])
def test_instruction_sets_are_equal(level, single):
    """TORSION_ISA holds for a process. Each also runs 1, 2 and 3 threads, without the fixtures of this suite."""
    environment = {**os.environ, "TORSION_ISA": level}
    script = Path(digests.__file__)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for threads, found in json.loads(done.stdout).items():
        different = [case for case in single if found[case] != single[case]]
        assert not different, f"TORSION_ISA={level}, {threads} threads: {different}"


def test_digest_sees_one_bit():
    """What the tests above compare is not blind."""
    optimizer = digests.build("TAM", "float32")
    digests.advance(optimizer, 0, 1)
    before = digests.digest(optimizer)
    p = optimizer.param_groups[0]["params"][-1]
    p.detach()[-1:].view(torch.int32).bitwise_xor_(1)
    assert digests.digest(optimizer) != before


# Save and resume


def _saved(optimizer):
    """Parameters and optimizer through a file and into fresh objects, as a training script does it."""
    file = io.BytesIO()
    params = optimizer.param_groups[0]["params"]
    torch.save({"params": [p.detach() for p in params], "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    # Other values, another seed for stochastic rounding: all must come from the file.
    torch.manual_seed(99)
    fresh = [torch.nn.Parameter(torch.full_like(p, 5.0)) for p in params]
    group = {k: v for k, v in optimizer.param_groups[0].items() if k in ("scope", "init", "stochastic_rounding")}
    resumed = type(optimizer)(fresh, backend=optimizer._backend, **group)
    resumed.load_state_dict(loaded["optimizer"])
    with torch.no_grad():
        for p, saved in zip(fresh, loaded["params"], strict=True):
            p.copy_(saved)
    return resumed


def _deepcopied(optimizer):
    return copy.deepcopy(optimizer)


def _pickled(optimizer):
    return pickle.loads(pickle.dumps(optimizer))


each_way = pytest.mark.parametrize("way", [_saved, _deepcopied, _pickled], ids=["save", "deepcopy", "pickle"])


@each_way
@each_case
def test_goes_on_mid_run(case, way, compiled_target):
    """Three steps, save, three more; against six in one go. bfloat16 and stochastic rounding included."""
    straight, broken = (moved(digests.build(*case.split()), compiled_target) for _ in range(2))
    digests.advance(straight, 0, 6)
    digests.advance(broken, 0, 3)
    resumed = way(broken)
    digests.advance(resumed, 3, 6)
    assert digests.digest(resumed) == digests.digest(straight)
    digests.advance(broken, 3, 6)  # and the original is none the worse for it
    assert digests.digest(broken) == digests.digest(straight)


@each_way
@pytest.mark.parametrize("scope", ["global", "group", "tensor"])
@each_dtype(torch.float32, torch.bfloat16)
def test_goes_on_mid_run_in_every_scope(dtype, scope, way, fast_target):
    """With a tensor that has not stepped yet, and init="clone", which must not seed again."""
    shapes = [(7,), (3, 5), ()]
    start, gradients = randoms(shapes), [randoms(shapes) for _ in range(4)]
    for grads in gradients[:2]:
        grads[2] = None
    keywords = {"lr": 0.1, "scope": scope, "init": "clone", "stochastic_rounding": dtype == torch.bfloat16}
    torch.manual_seed(1)
    straight = fast_target.optimizer(torsion.TAM, [fast_target.parameter(t, dtype) for t in start], **keywords)
    torch.manual_seed(1)
    broken = fast_target.optimizer(torsion.TAM, [fast_target.parameter(t, dtype) for t in start], **keywords)
    take_steps(straight, gradients)
    take_steps(broken, gradients[:2])
    resumed = way(broken)
    take_steps(resumed, gradients[2:])
    assert same_bits(snapshot(resumed), snapshot(straight))


@each_way
def test_goes_on_mid_run_in_triton(way, triton_target):
    start, gradients = randoms([(7,), ()]), [randoms([(7,), ()]) for _ in range(2)]
    runs = []
    for breaks in (False, True):
        torch.manual_seed(1)
        params = [triton_target.parameter(t, torch.bfloat16) for t in start]
        optimizer = triton_target.optimizer(torsion.TAM, params, lr=0.1, stochastic_rounding=True)
        take_steps(optimizer, gradients[:1])
        optimizer = way(optimizer) if breaks else optimizer
        take_steps(optimizer, gradients[1:])
        runs.append(snapshot(optimizer))
    assert same_bits(*runs)


def test_copies_share_no_memory(fast_target):
    """Stepping a copy leaves the original, whose scalars are views of common tensors, as it was."""
    params = [fast_target.parameter(t) for t in randoms([(7,), (3, 5)])]
    optimizer = fast_target.optimizer(torsion.AdaTAM, params, lr=0.01)
    gradients = [randoms([(7,), (3, 5)]) for _ in range(2)]
    take_steps(optimizer, gradients[:1])
    before = snapshot(optimizer)
    for way in (_saved, _deepcopied, _pickled):
        take_steps(way(optimizer), gradients[1:])
        assert same_bits(snapshot(optimizer), before), way.__name__


def test_stochastic_runs_depend_on_the_seed(fast_target):
    """Were the noise constant, resuming would be no test of it."""
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        p = fast_target.parameter(torch.full((500,), 1.0), torch.bfloat16)
        optimizer = fast_target.optimizer(torsion.TAM, [p], lr=1e-3, stochastic_rounding=True)
        take_steps(optimizer, [[torch.ones(500)]])
        runs.append(p)
    assert same_bits(runs[:1], runs[1:2])
    assert not same_bits(runs[:1], runs[2:])


def test_back_ends_agree_to_the_last_bit_of_a_float32(target):
    """The sums differ in the last bits of a float64; in float32 parameters and state nothing of that is left.

    Not a law (a coefficient might lie at a rounding boundary) but so on these numbers, and any change of an operation's
    order in one back end shows.
    """
    start, gradients = randoms([(41,), (3, 5)]), [randoms([(41,), (3, 5)]) for _ in range(2)]
    runs = []
    for backend in (target.backend, "reference"):
        params = [target.parameter(t, torch.float32) for t in start]
        optimizer = torsion.AdaTAM(params, lr=0.01, weight_decay=0.1, bias_correction=True, backend=backend)
        take_steps(optimizer, gradients)
        runs.append(snapshot(optimizer))
    assert same_bits(*runs)
