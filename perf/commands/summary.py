"""``python -m perf summary``: the targets beside what was measured; no GPU needed."""

from __future__ import annotations

import argparse

from perf.commands import arguments
from perf.summary import show_all

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.results(parser)


def run(args: argparse.Namespace) -> int:
    return show_all(args.results)
