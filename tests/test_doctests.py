"""Every public name says what it is, and its examples run as they are written."""

from __future__ import annotations

import doctest
import importlib
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

import triton_bn

PACKAGE = Path(triton_bn.__file__).parent
#: Every file that has an example.
FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8") and path.parent.name != "kernels"
]
PUBLIC: dict[str, Any] = {
    **{f"triton_bn.{name}": getattr(triton_bn, name) for name in triton_bn.__all__},
    "triton_bn.functional.batch_norm": triton_bn.functional.batch_norm,
}
DOCUMENTED = {
    name: thing
    for name, thing in PUBLIC.items()
    if inspect.isclass(thing) or inspect.isfunction(thing)
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_examples_run_as_they_are_written(path: Path) -> None:
    name = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    module = importlib.import_module(name.removesuffix(".__init__"))
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    known = {"torch": torch, "triton_bn": triton_bn}
    failed, tried = doctest.testmod(module, extraglobs=known, optionflags=flags)
    assert tried
    assert not failed


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_public_name_is_documented(name: str) -> None:
    text = inspect.getdoc(DOCUMENTED[name]) or ""
    assert "Example" in text
    parameters = set(inspect.signature(DOCUMENTED[name]).parameters) - {"self", "model", "inputs"}
    if inspect.isfunction(DOCUMENTED[name]):
        for parameter in parameters:
            assert parameter in text, f"{name} does not say what {parameter} is"


def test_batch_norm_2d_names_all_activations_and_arguments() -> None:
    text = inspect.getdoc(triton_bn.BatchNorm2d) or ""
    for name in triton_bn.problem.ACTIVATIONS:
        assert f'``"{name}"``' in text
        assert f"``{name}``" in (inspect.getdoc(triton_bn.Activation) or "")
    for parameter in inspect.signature(triton_bn.BatchNorm2d).parameters:
        assert parameter in text
