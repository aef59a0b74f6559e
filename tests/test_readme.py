"""The README's examples run as printed, and what it promises exists."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text()


BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)


EXPECTED = {"tam": (11, "tensor("), "lookbehind": (16, "tensor("), "demp": (14, "parameters")}


@pytest.mark.parametrize(("block", "expected"), list(zip(BLOCKS, EXPECTED.values(), strict=True)), ids=EXPECTED)
def test_example_runs(block, expected, capsys):
    lines, printed = expected
    assert len([line for line in block.splitlines() if line.strip()]) <= lines
    exec(compile(block, "README.md", "exec"), {})
    assert printed in capsys.readouterr().out


def test_named_files_exist():
    for link in re.findall(r"\]\(([\w/.-]+\.(?:md|py))\)", README):
        assert (Path(__file__).parents[1] / link).exists(), link


def test_make_targets_exist():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)\b", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target
