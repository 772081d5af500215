"""``python -m perf visit``, or ``make gpu``: see :mod:`perf.visit`."""

from __future__ import annotations

import argparse

from perf import visit

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    visit.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    return visit.run(args)
