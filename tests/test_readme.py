"""The README's Python runs as it is written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_there_is_an_example() -> None:
    assert any(block.startswith("import ") for block in BLOCKS)


@pytest.mark.parametrize(
    "block",
    [b for b in BLOCKS if b.startswith("import ")],
    ids=lambda block: str(BLOCKS.index(block)),
)
def test_the_example_runs(block: str, capsys: pytest.CaptureFixture[str]) -> None:
    exec(compile(block, "README.md", "exec"), {})
    assert "forward" in capsys.readouterr().out  # the plan it prints


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", README))
def test_what_it_links_to_is_there(path: str) -> None:
    assert (Path(__file__).parent.parent / path).exists()
