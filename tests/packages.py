"""Packages whose models the tests take: one that is missing skips the test."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

from perf import networks


def package(name: str) -> Any:
    """A package, or a skip."""
    pytest.importorskip(name.partition(".")[0], exc_type=ImportError)
    return importlib.import_module(name)


def torchvision() -> Any:
    """torchvision, or a skip."""
    try:
        return networks.torchvision()
    except ImportError:
        pytest.skip("torchvision is not installed")
