"""The command line: ``python -m triton_bn COMMAND``.

A command is a module of :mod:`triton_bn.commands` with ``add_arguments(parser)`` and
``run(args) -> int``, the exit code: 0 when what was asked for was done and is right, 1 when it is
not, 2 where it cannot be done (a bad command line, no GPU). It is imported when it is named.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch

from triton_bn.version import __version__


class Command(NamedTuple):
    help: str
    #: Whether it is about the kernels, so that without a GPU it runs them in Triton's interpreter.
    kernels: bool = False


COMMANDS = {
    "demo": Command("train on scanned digits beside torch.nn.BatchNorm2d", kernels=True),
    "info": Command("versions, devices, caches, and what would run where"),
    "plan": Command("the plans that an input would run under"),
    "check": Command("errors against float64, ours and torch's, by shape and dtype"),
    "tune": Command("search the best plans for a shape, and remember them"),
    "bench": Command("time the kernels against torch on a GPU"),
    "inspect": Command("what the compiler makes of the kernels: registers, spills, loads"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (argparse exits with 2 by itself)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        "python -m triton_bn", description="Batch normalization in Triton."
    )
    parser.add_argument("--version", action="version", version=f"triton_bn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help)
        if name in argv:
            _module(name).add_arguments(subparser)
    args = parser.parse_args(argv)
    command = COMMANDS[args.command]
    try:
        if command.kernels and _interpreter_undecided():
            # Triton decides when a kernel is decorated, which importing the package has done.
            again = [sys.executable, "-m", "triton_bn", *argv]
            return subprocess.call(again, env={**os.environ, "TRITON_INTERPRET": "1"})
        code: int = _module(args.command).run(args)
        return code
    except KeyboardInterrupt:
        return 130


def _module(name: str) -> Any:
    return import_module(f"triton_bn.commands.{name}")


def _interpreter_undecided() -> bool:
    return not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ


if __name__ == "__main__":
    sys.exit(main())
