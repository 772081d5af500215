"""``python -m triton_bn bench``: times the kernels beside torch, by the repository's benchmark."""

from __future__ import annotations

import argparse
import subprocess
import sys
from importlib.util import find_spec

import torch

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: ``python -m perf`` takes them."""


def run(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print(
            "bench times kernels, so it needs a GPU that PyTorch sees, and there is none here.\n"
            "Without one, `python -m triton_bn inspect` shows what the compiler makes of the\n"
            "kernels, `python -m triton_bn check` their errors, and perf/results in the\n"
            "repository what was measured on GPUs.",
            file=sys.stderr,
        )
        return 2
    if find_spec("perf") is None:
        print("the benchmark is the folder perf of the repository: run this there", file=sys.stderr)
        return 2
    return subprocess.call([sys.executable, "-m", "perf"])
