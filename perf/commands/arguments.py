"""Options that several commands take, so that they mean the same everywhere."""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

__all__ = ["RESULTS", "budget", "jobs", "only", "results"]

#: Where results are kept unless ``--results`` names another folder: a folder a GPU.
RESULTS = Path(__file__).parent.parent / "results"


def results(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"(default: {RESULTS})")


def budget(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--budget", type=float, default=math.inf, metavar="SECONDS", help="(default: no end)"
    )


def only(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="WORD",
        help="cases with all of these: a network, shape (256x64x56x56), layout, dtype, op, measure",
    )  # fmt: skip


def jobs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--jobs",
        type=int,
        default=os.cpu_count() or 1,
        help="processes that compile (default: all)",
    )
