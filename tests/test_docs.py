"""What README and docs show runs as it is written, and what they link to is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import triton_bn

ROOT = Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
    *sorted(ROOT.glob("docs/*.md")),
]
BLOCKS = [
    (page.name, number, block)
    for page in PAGES
    for number, block in enumerate(
        re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    )
    if block.startswith("import ")
]
LINKS = [
    (page, path)
    for page in PAGES
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8"))
]


@pytest.mark.parametrize(("page", "number", "block"), BLOCKS)
def test_an_example_runs(
    page: str, number: int, block: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(block, f"{page}, block {number}", "exec"), {})


def test_readme_begins_with_an_example_that_prints_a_plan(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (first, *_) = (block for page, _, block in BLOCKS if page == "README.md")
    exec(compile(first, "README.md", "exec"), {})
    assert "forward" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("page", "path"), LINKS, ids=[f"{page.name}-{path}" for page, path in LINKS]
)
def test_what_a_page_links_to_is_there(page: Path, path: str) -> None:
    assert (page.parent / path).exists()


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    shown = set(re.findall(r"auto(?:class|function|module):: ([\w.]+)", text))
    shown = {name.removeprefix("triton_bn.") for name in shown}
    assert set(triton_bn.__all__) - {"functional", "__version__"} <= shown
