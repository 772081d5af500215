"""Packages whose models the tests take: one that is missing skips the test."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch

#: What torchvision registers an implementation for as it is imported. Its compiled operators load
#: only beside the very build of torch they were compiled for.
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
LIBRARIES: list[torch.library.Library] = []  # an operator lives as long as the library that has it


def package(name: str) -> Any:
    """A package, or a skip."""
    pytest.importorskip(name.partition(".")[0], exc_type=ImportError)
    return importlib.import_module(name)


def torchvision() -> Any:
    """torchvision, whatever torch it was compiled for: its models need none of its operators."""
    if "torchvision" not in sys.modules:
        try:
            importlib.import_module("torchvision")
        except ImportError:
            pytest.skip("torchvision is not installed")
        except RuntimeError:  # operator torchvision::nms does not exist
            for module in [name for name in sys.modules if name.startswith("torchvision")]:
                del sys.modules[module]
            LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
            for schema in OPERATORS:
                LIBRARIES[0].define(schema)
    return importlib.import_module("torchvision")
