"""``python -m perf plots``: draws all folders of results; no GPU needed."""

from __future__ import annotations

import argparse

from perf.commands import arguments
from perf.plots import draw_all

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.results(parser)


def run(args: argparse.Namespace) -> int:
    return draw_all(args.results)
