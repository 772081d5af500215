"""``triton-bn bench``: times the kernels beside torch, by the repository's benchmark."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec

import torch

from triton_bn.commands.arguments import CannotRun

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: ``python -m perf`` takes them."""


def run(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        raise CannotRun(
            "bench times kernels, so it needs a GPU that PyTorch sees, and there is none here.\n"
            "Without one, `triton-bn inspect` shows what the compiler makes of the kernels,\n"
            "`triton-bn check` their errors, and perf/results in the repository what was\n"
            "measured on GPUs."
        )
    if find_spec("perf") is None:
        raise CannotRun("the benchmark is the folder perf of the repository: run this there")
    return subprocess.call([sys.executable, "-m", "perf"])
