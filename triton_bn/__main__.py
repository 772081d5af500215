"""The command line: ``triton-bn COMMAND``, or ``python -m triton_bn COMMAND``.

A command is a module of :mod:`triton_bn.commands` with ``add_arguments(parser)`` and
``run(args) -> int``, the exit code: 0 when what was asked for was done and is right, 1 when it is
not. Where it cannot be done (a bad command line, no GPU) it raises ``CannotRun``, and the exit code is 2.
It is imported when it is named.

With argcomplete installed, ``eval "$(register-python-argcomplete triton-bn)"`` completes commands and flags.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from triton_bn.commands.arguments import CannotRun
from triton_bn.version import __version__


class Command(NamedTuple):
    help: str
    #: Whether it is about the kernels, so that without a GPU it runs them in Triton's interpreter.
    kernels: bool = False


COMMANDS = {
    "demo": Command("train on scanned digits beside torch.nn.BatchNorm2d", kernels=True),
    "info": Command("versions, devices, caches, and what would run where"),
    "plan": Command("the plans that an input would run under"),
    "check": Command("errors against float64, ours and torch's, by shape and dtype", kernels=True),
    "tune": Command("search the best plans for a shape, and remember them"),
    "bench": Command("time the kernels against torch on a GPU"),
    "inspect": Command("what the compiler makes of the kernels: registers, spills, loads"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (argparse exits with 2 by itself)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(
        "triton-bn" if Path(sys.argv[0]).stem == "triton-bn" else "python -m triton_bn",
        description="Batch normalization in Triton.",
        epilog="Exit codes: 0 done and right, 1 wrong, 2 cannot be done here.",
    )
    try:
        return _run(parser, argv)
    except CannotRun as error:
        message = str(error)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "triton":
            raise
        message = f"this needs Triton, which is not installed ({error})"
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    print(f"{parser.prog}: error: {message}", file=sys.stderr)
    return 2


def _run(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    parser.add_argument("--version", action="version", version=f"triton_bn {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    typed = [*argv, *os.environ.get("COMP_LINE", "").split()]  # what a shell wants completed
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help)
        if name in typed:
            _module(name).add_arguments(subparser)
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)
    args = parser.parse_args(argv)
    if COMMANDS[args.command].kernels and _interpreter_undecided():
        # Triton decides when a kernel is decorated, which importing the package has done.
        again = [sys.executable, "-m", "triton_bn", *argv]
        return subprocess.call(again, env={**os.environ, "TRITON_INTERPRET": "1"})
    code: int = _module(args.command).run(args)
    sys.stdout.flush()  # here, where a closed pipe is expected
    return code


def _module(name: str) -> Any:
    return import_module(f"triton_bn.commands.{name}")


def _interpreter_undecided() -> bool:
    return not torch.cuda.is_available() and "TRITON_INTERPRET" not in os.environ


if __name__ == "__main__":
    sys.exit(main())
