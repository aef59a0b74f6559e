"""Which back end runs, who decides, and what is said about it."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from helpers import Call, Target

import torsion
from torsion.ops import _backends, _dispatch, _native
from torsion.ops._rules import PASSES, RULES, TAM

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
BEST = next(
    name
    for name in ("cuda", "triton", "cpu", "reference")
    if not _backends.obstacle(name, DEVICE) and (CUDA or name != "triton")
)


@pytest.fixture
def ran(monkeypatch):
    """Names of the back ends that steps ran on, in order."""
    found = []
    apply_ = _dispatch.apply_

    def watched(rule, step, sums, backend):
        found.append(backend)
        apply_(rule, step, sums, backend)

    monkeypatch.setattr(_dispatch, "apply_", watched)
    return found


def step(backend=None):
    p = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    p.grad = torch.ones_like(p)
    optimizer = torsion.TAM([p], backend=backend)
    optimizer.step()
    return optimizer


def test_backends_names_every_op():
    found = torsion.backends()
    assert set(found) == {*RULES, *PASSES, *_backends.KERNELS}
    for choice in found.values():
        assert set(choice) == {"chosen", "available", "why"}
        assert choice["chosen"] in choice["available"]
        assert "reference" in choice["available"]
        assert set(choice["available"]) <= {*_backends.NAMES, "torch"}
        assert choice["why"]


def test_the_best_is_chosen():
    found = torsion.backends()
    assert {found[op]["chosen"] for op in (*RULES, *PASSES)} == {BEST}
    for op, kernels in _backends.KERNELS.items():
        runnable = [name for name in kernels if not _backends.obstacle(name, DEVICE)]
        assert found[op]["chosen"] == next(name for name in runnable if CUDA or name != "triton"), op


def test_available_are_those_that_run():
    """What is listed takes a step; what is not says why when asked for."""
    available = torsion.backends()["tam_"]["available"]
    devices = ["cuda", "cpu"] if CUDA else ["cpu"]
    for name in _backends.NAMES:
        obstacles = [_backends.obstacle(name, device) for device in devices]
        assert (name in available) == any(not o for o in obstacles), name
        for device, obstacle in zip(devices, obstacles, strict=True):
            p = torch.nn.Parameter(torch.ones(2, device=device))
            if not obstacle:
                p.grad = torch.ones_like(p)
                torsion.TAM([p], backend=name).step()
            else:
                with pytest.raises(ValueError, match=f"backend='{name}' cannot be used: "):
                    torsion.TAM([p], backend=name)


def test_triton_is_interpreted_only_when_asked_for():
    """On CPU tensors it is for tests: available under TRITON_INTERPRET=1, never the choice."""
    if CUDA:
        pytest.skip("Triton runs on the GPU in this process")
    assert _backends.choose("cpu")[0] != "triton"
    if importlib.util.find_spec("triton"):
        assert "triton" in torsion.backends()["tam_"]["available"]


@pytest.mark.parametrize("value", ["", "0"])
def test_triton_without_the_interpreter_says_what_it_needs(monkeypatch, value):
    if not importlib.util.find_spec("triton"):
        pytest.skip("triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", value)
    with pytest.raises(
        ValueError, match=r"backend='triton' cannot be used: it runs on CUDA tensors.*TRITON_INTERPRET=1"
    ):
        torsion.TAM([torch.nn.Parameter(torch.ones(1))], backend="triton")


# TORSION_BACKEND


def test_the_environment_chooses(monkeypatch, ran):
    monkeypatch.setenv("TORSION_BACKEND", "reference")
    assert torsion.backends()["tam_"] == {
        "chosen": "reference",
        "available": torsion.backends()["tam_"]["available"],
        "why": "TORSION_BACKEND=reference",
    }
    step()
    assert ran == ["reference"]


def test_the_environment_chooses_for_ops(monkeypatch, ran):
    monkeypatch.setenv("TORSION_BACKEND", "reference")
    Call(TAM, [torch.ones(3, device=DEVICE)]).run()
    assert ran == ["reference"]


def test_the_argument_wins(monkeypatch, ran, target):
    """backend= before TORSION_BACKEND, in optimizers and in ops."""
    monkeypatch.setenv("TORSION_BACKEND", "reference" if target.backend != "reference" else BEST)
    p = target.parameter([1.0])
    p.grad = torch.ones_like(p)
    target.optimizer(torsion.TAM, [p]).step()
    Call(TAM, [torch.ones(3, device=target.device)]).run(target.backend)
    python = target.backend in ("reference", "triton")
    assert ran == ([target.backend] * 2 if python else [])


def test_an_unknown_name_in_the_environment(monkeypatch):
    monkeypatch.setenv("TORSION_BACKEND", "gpu")
    message = r"TORSION_BACKEND='gpu' is not a back end; use one of cuda, triton, cpu, reference"
    with pytest.raises(ValueError, match=message):
        torsion.backends()
    with pytest.raises(ValueError, match=message):
        torsion.TAM([torch.nn.Parameter(torch.ones(1))])
    with pytest.raises(ValueError, match=message):
        Call(TAM, [torch.ones(3)]).run()


def test_an_impossible_name_in_the_environment(monkeypatch):
    """Known, but not for these tensors: an error, not another back end in silence."""
    monkeypatch.setenv("TORSION_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"TORSION_BACKEND='cuda' cannot be used: it runs on CUDA tensors"):
        torsion.TAM([torch.nn.Parameter(torch.ones(1))])
    if not CUDA:
        with pytest.raises(ValueError, match="TORSION_BACKEND='cuda' cannot be used"):
            torsion.backends()


def test_a_choice_made_impossible_later_changes_nothing(monkeypatch):
    """The step raises before it writes."""
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = torsion.TAM([p])
    p.grad = torch.ones_like(p)
    monkeypatch.setenv("TORSION_BACKEND", "cuda")
    with pytest.raises(ValueError, match="TORSION_BACKEND='cuda' cannot be used"):
        optimizer.step()
    assert p.tolist() == [1, 1]


def test_an_empty_variable_is_no_choice(monkeypatch):
    monkeypatch.setenv("TORSION_BACKEND", "")
    assert torsion.backends()["tam_"]["chosen"] == BEST


@pytest.mark.parametrize("name", ["gpu", "CPU", ""])
def test_an_unknown_argument(name):
    with pytest.raises(ValueError, match=f"backend='{name}'.*cuda.*triton.*cpu.*reference"):
        torsion.TAM([torch.nn.Parameter(torch.ones(1))], backend=name)
    with pytest.raises(
        ValueError, match=f"backend='{name}' is not a back end; use one of cuda, triton, cpu, reference"
    ):
        Call(TAM, [torch.ones(3)]).run(name)


# A module that is missing


@pytest.mark.parametrize("module", ["_C", "_plan"])
def test_without_a_compiled_module_the_reference_steps_in(module, monkeypatch, ran):
    """Either may be missing alone: _plan is bound to one Python version, _C is not. Said in ``why``."""
    monkeypatch.setattr(_native, "missing", {module: f"torsion.{module} was not built (for this test)"})
    chosen, why = _backends.choose("cpu")
    assert chosen == "reference"
    assert f"torsion.{module} was not built" in why
    with pytest.raises(ValueError, match=f"backend='cpu' cannot be used: torsion.{module} was not built"):
        torsion.TAM([torch.nn.Parameter(torch.ones(1))], backend="cpu")
    if module == "_plan":
        monkeypatch.setattr(_native, "plan", None)
    p = torch.nn.Parameter(torch.ones(3))
    p.grad = torch.ones_like(p)
    optimizer = torsion.TAM([p], lr=0.5)
    optimizer.step()
    assert ran == ["reference"]
    assert p.tolist() == pytest.approx([0.75] * 3)


def test_why_names_what_was_passed_over(monkeypatch):
    monkeypatch.setitem(_native.missing, "_C_cuda", "torsion._C_cuda was not built (for this test)")
    chosen, why = _backends.choose("cuda")
    assert chosen == ("triton" if importlib.util.find_spec("triton") else "reference")
    assert "torsion._C_cuda was not built" in why


# build_info


def test_build_info():
    info = torsion.build_info()
    assert set(info) == {"version", "torch", "cuda", "modules", "build"}
    assert info["version"] == torsion.__version__
    assert info["torch"] == torch.__version__
    assert info["cuda"] == torch.version.cuda
    assert set(info["modules"]) == {"_C", "_plan", "_C_cuda"}
    for name, module in (("_C", _native.C), ("_plan", _native.plan), ("_C_cuda", _native.C_cuda)):
        assert (info["modules"][name] == "loaded") == (module is not None), name


@pytest.mark.skipif(_native.plan is None, reason=_native.missing.get("_plan", ""))
def test_build_facts():
    facts = torsion.build_info()["build"]
    for name in ("version", "mode", "torch", "compiler", "flags", "commit", "cuda", "cuda_archs", "cuda_missing"):
        assert isinstance(facts[name], str), name
    assert facts["version"] == torsion.__version__
    assert facts["mode"] in ("auto", "cpu", "cuda")
    # Bitwise equality of instruction sets rests on it.
    assert "-ffp-contract=off" in facts["flags"]


def test_targets_of_this_suite_cover_every_back_end_available():
    """A back end that runs here and is not in the fixtures would go untested."""
    from helpers import TARGETS

    device = {t.backend for t in TARGETS if CUDA or t.device == "cpu"}
    assert set(torsion.backends()["tam_"]["available"]) <= device
    assert isinstance(TARGETS[0], Target)
    assert "TORSION_BACKEND" not in os.environ
