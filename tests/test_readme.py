"""The README's example runs as printed, and what it promises exists."""

import re
from pathlib import Path

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_example_runs(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len(blocks) == 1
    assert len([line for line in blocks[0].splitlines() if line.strip()]) <= 11
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert "tensor(" in capsys.readouterr().out


def test_named_files_exist():
    for link in re.findall(r"\]\(([A-Z]+\.md)\)", README):
        assert (Path(__file__).parents[1] / link).exists(), link


def test_make_targets_exist():
    makefile = (Path(__file__).parents[1] / "Makefile").read_text()
    for target in set(re.findall(r"make (\w+)\b", README)):
        assert re.search(rf"^{target}:", makefile, re.M), target
