"""Who may import whom: each file of the package from lower floors only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "triton_bn"

FLOORS = {
    0: ["problem", "sync", "version", "tuning.cache", "conversion.derive", "inspection.binary"],
    1: ["kernels", "reference", "oracle", "plan", "recompute", "conversion.replace"],
    2: ["launch", "commands.arguments", "tuning.memory", "tuning.results", "conversion.freeze"],
    3: ["tuning.trial", "inspection.report", "route"],
    4: ["tuning.ahead", "masked"],
    5: ["tuning.search"],
    6: ["tuning.resolve"],
    7: ["tuning.tune", "verbs"],
    8: ["autograd"],
    9: ["operators"],
    10: ["functional"],
    11: ["modules"],
    12: ["demo.lockstep", "conversion.fuse"],
    13: ["demo.digits", "demo.picture", "conversion.rewrite"],
    14: ["conversion.search"],
    15: ["conversion.convert"],
    16: ["demo.ddp", *(f"commands.{name}" for name in ("bench", "check", "demo", "info"))],
    17: [f"commands.{name}" for name in ("inspect", "plan", "tune")],
    18: ["__main__", "__init__"],
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
KERNELS = sorted((PACKAGE / "kernels").glob("*.py"))
#: Every file by its dotted name; a wing's ``__init__`` holds a docstring alone.
FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path not in KERNELS and (path.name != "__init__.py" or path.parent == PACKAGE)
}
WINGS = sorted(path for path in PACKAGE.glob("*/__init__.py") if path.parent.name != "kernels")


def imports(source: str) -> list[str]:
    """The modules of the package that a source imports, anywhere in it: ``""`` is the package root.

    ``kernels.forward`` and the like count as ``kernels``.
    """
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "triton_bn" + (f".{node.module}" if node.module else "") if node.level else ""
            base = base or node.module or ""
            # from triton_bn import name: a module of it, or the root's own
            found += [f"{base}.{alias.name}" for alias in node.names]
    return [_module(name.split(".")[1:]) for name in found if name.split(".")[0] == "triton_bn"]


def _module(parts: list[str]) -> str:
    """The module that a dotted name lies in: ``""`` for the package root's own."""
    if parts[:1] == ["kernels"]:
        return "kernels"
    names = (".".join(parts[:length]) for length in (2, 1))
    return next((name for name in names if name in FILES), "")


@pytest.mark.parametrize("file", FILES)
def test_a_file_imports_from_lower_floors_only(file: str) -> None:
    assert file in FLOOR, f"{file} has no floor"
    for name in imports(FILES[file].read_text(encoding="utf-8")):
        assert name, f"{file} imports the package root"
        assert FLOOR[name] < FLOOR[file], f"{file} imports {name}"


def test_every_floor_holds_files_that_are_there() -> None:
    assert FLOOR.keys() - FILES.keys() <= {"kernels"}


@pytest.mark.parametrize("path", WINGS, ids=lambda path: path.parent.name)
def test_a_wing_says_what_lives_there_and_holds_no_code(path: Path) -> None:
    (docstring,) = ast.parse(path.read_text(encoding="utf-8")).body
    assert isinstance(docstring, ast.Expr)


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_import_nothing_but_triton_and_kernels(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert set(imports(source)) <= {"kernels"}
    modules = {
        node.module if isinstance(node, ast.ImportFrom) else alias.name
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    assert {str(module).split(".")[0] for module in modules} <= {"triton", "triton_bn", "typing"}


@pytest.mark.parametrize("path", KERNELS, ids=lambda path: path.stem)
def test_kernels_hold_jit_functions_only(path: Path) -> None:
    """Beside them stand imports, docstrings and the tuples that kernels hand each other."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            assert [ast.unparse(d) for d in node.decorator_list] == ["triton.jit"], node.name
        elif isinstance(node, ast.ClassDef):
            assert [ast.unparse(base) for base in node.bases] == ["NamedTuple"], node.name
            assert all(isinstance(each, ast.AnnAssign | ast.Expr) for each in node.body), node.name
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            assert isinstance(node, ast.Expr), ast.unparse(node)
            assert isinstance(node.value, ast.Constant), ast.unparse(node)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import triton_bn", [""]),
        ("import triton_bn.plan as p", ["plan"]),
        ("from triton_bn import BatchNorm2d, plan", ["", "plan"]),
        ("from triton_bn.tuning import cache", ["tuning.cache"]),
        ("from triton_bn.tuning.cache import read", ["tuning.cache"]),
        ("from triton_bn.kernels.forward import k", ["kernels"]),
        ("def f():\n    from . import problem", ["problem"]),
        ("from .launch import forward", ["launch"]),
        ("import torch, triton", []),
    ],
)
def test_every_form_of_import_is_seen(source: str, expected: list[str]) -> None:
    assert imports(source) == expected
