"""The command line: help, exit codes, the one line for bad usage, and the doctor."""

import importlib.util
import json
import subprocess
import sys

import pytest
import torch

import torsion
from torsion.cli import main


def _refused(capsys, *words):
    """Return the only line on standard error of a call that must exit with 2 and print nothing else."""
    with pytest.raises(SystemExit) as exit_:
        main(words)
    out, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert out == ""
    assert err.count("\n") == 1, err
    return err


@pytest.mark.parametrize("words", [["--help"], ["doctor", "--help"], ["demo", "--help"]], ids=" ".join)
def test_help_goes_to_standard_output(capsys, words):
    with pytest.raises(SystemExit) as exit_:
        main(words)
    out, err = capsys.readouterr()
    assert exit_.value.code == 0
    assert "usage: torsion" in out
    assert err == ""


@pytest.mark.parametrize(
    ("words", "flag", "remedy"),
    [
        ([], "no command", "doctor"),
        (["demos"], "demos", "demo"),
        (["--frobnicate"], "--frobnicate", "--help"),
        (["doctor", "--xml"], "--xml", "--help"),
        (["demo", "--steps", "0"], "--steps", "at least 1"),
        (["demo", "--steps", "-3"], "--steps", "at least 1"),
        (["demo", "--steps", "many"], "--steps", "not an integer"),
        (["demo", "--threads", "0"], "--threads", "at least 1"),
        (["demo", "--seed", "-1"], "--seed", "at least 0"),
        (["demo", "--task", "imagenet"], "--task", "digits"),
        (["demo", "--method", "snip"], "--method", "tam"),
        (["demo", "--device", "tpu"], "--device", "cuda"),
        (["demo", "--step", "5"], "--step", "--help"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_line_with_flag_and_remedy(capsys, words, flag, remedy):
    line = _refused(capsys, *words)
    assert flag in line
    assert remedy in line


def test_an_unwritable_directory_is_refused_before_any_work(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    line = _refused(capsys, "demo", "--out", str(tmp_path / "file" / "below"))
    assert "--out" in line
    assert "writable" in line


def test_an_impossible_back_end_is_refused(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("TORSION_BACKEND", "abacus")
    line = _refused(capsys, "demo", "--out", str(tmp_path))
    assert "TORSION_BACKEND" in line
    assert "reference" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused(capsys):
    assert "--device cpu" in _refused(capsys, "demo", "--device", "cuda")


@pytest.mark.parametrize(("module", "distribution"), [("rich", "rich"), ("sklearn", "scikit-learn")])
def test_a_missing_extra_is_named(capsys, monkeypatch, tmp_path, module, distribution):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == module else find(name, *more))
    line = _refused(capsys, "demo", "--out", str(tmp_path))
    assert distribution in line
    assert "torsion[demo]" in line


def test_doctor_names_every_op_its_back_end_and_the_reason(capsys):
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    for op, choice in torsion.backends().items():
        assert op in out
        assert choice["chosen"] in out
        assert choice["why"] in out
    for module in ("_C", "_plan", "_C_cuda"):
        assert module in out


def test_doctor_json_is_one_object_with_the_same_facts(capsys):
    assert main(["doctor", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["backends"] == torsion.backends()
    assert facts["build"]["modules"].keys() == torsion.build_info()["modules"].keys()


def test_doctor_explains_an_impossible_back_end(capsys, monkeypatch):
    monkeypatch.setenv("TORSION_BACKEND", "abacus")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "abacus" in out
    assert "TORSION_BACKEND" in out


def test_python_dash_m_torsion_is_the_same_command_line():
    done = subprocess.run([sys.executable, "-m", "torsion", "--version"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0
    assert done.stdout == f"torsion {torsion.__version__}\n"
