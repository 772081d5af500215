"""Who may import whom: each file of the package from lower floors only."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "triton_bn"

FLOORS = {
    0: ["problem", "cache", "sync", "rewrite", "binary", "arguments", "version", "kernels"],
    1: ["reference", "oracle", "plan", "fuse"],
    2: ["launch", "results"],
    3: ["tune", "report"],
    4: ["ops"],
    5: ["functional"],
    6: ["modules"],
    7: ["lockstep"],
    8: ["convert", "digits", "picture"],
    9: ["demo", "check", "info", "explain", "tune_command", "bench", "ddp_demo"],
    10: ["__main__", "__init__"],
}
FLOOR = {name: floor for floor, names in FLOORS.items() for name in names}
FILES = sorted(PACKAGE.glob("*.py"))
KERNELS = sorted((PACKAGE / "kernels").glob("*.py"))


def imports(source: str) -> list[str]:
    """The modules of the package that a source imports, anywhere in it: ``""`` is the package root.

    ``kernels.forward`` and the like count as ``kernels``.
    """
    modules = {path.stem for path in FILES} | {"kernels"}
    found: list[str] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "triton_bn" + (f".{node.module}" if node.module else "") if node.level else ""
            base = base or node.module or ""
            if base == "triton_bn":  # from triton_bn import name: a module of it, or the root's own
                found += [
                    f"triton_bn.{alias.name}" if alias.name in modules else "triton_bn"
                    for alias in node.names
                ]
            else:
                found.append(base)
    parts = [name.split(".") for name in found]
    return [part[1] if len(part) > 1 else "" for part in parts if part[0] == "triton_bn"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_file_imports_from_lower_floors_only(path: Path) -> None:
    assert path.stem in FLOOR, f"{path.name} has no floor"
    for name in imports(path.read_text(encoding="utf-8")):
        assert name, f"{path.name} imports the package root"
        assert FLOOR[name] < FLOOR[path.stem], f"{path.name} imports {name}"


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
        ("from triton_bn.kernels.forward import k", ["kernels"]),
        ("def f():\n    from . import problem", ["problem"]),
        ("from .launch import forward", ["launch"]),
        ("import torch, triton", []),
    ],
)
def test_every_form_of_import_is_seen(source: str, expected: list[str]) -> None:
    assert imports(source) == expected
