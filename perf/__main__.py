"""The command line: ``python -m perf COMMAND`` (``run`` where none is named)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NamedTuple

import torch

from triton_bn.tuning.search import WITHOUT_GPU

__all__ = ["COMMANDS", "main"]


class Command(NamedTuple):
    help: str
    #: Whether there is nothing it could do without one.
    gpu: bool = False


#: Each is the module of that name in :mod:`perf.commands`.
COMMANDS = {
    "run": Command("time the cases, the most telling first", gpu=True),
    "search": Command("time every plan of the telling cases, and remember the best", gpu=True),
    "ab": Command("A/B comparisons of plans, and how long programs wait for one another", gpu=True),
    "visit": Command("all of it on a GPU that is there for ten minutes", gpu=True),
    "memory": Command("what whole networks keep for backward, counted on a CPU"),
    "cpu": Command("converted models beside stock ones on CPU tensors"),
    "host": Command("what a call costs the host beside torch.nn's, with a GPU that is not there"),
    "plots": Command("draw all folders of results"),
    "summary": Command("the targets beside what was measured"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code (argparse exits with 2 by itself)."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or (argv[0].startswith("-") and argv[0] not in ("-h", "--help")):
        argv = ["run", *argv]
    parser = argparse.ArgumentParser("python -m perf", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, command in COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=command.help)
        if name == argv[0]:
            _module(name).add_arguments(subparser)
    args = parser.parse_args(argv)
    if COMMANDS[args.command].gpu and not torch.cuda.is_available():
        need = f"perf {args.command} times kernels, so it needs a GPU that PyTorch sees."
        print(need, WITHOUT_GPU, file=sys.stderr)
        return 2
    code: int = _module(args.command).run(args)
    return code


def _module(name: str) -> Any:
    return import_module(f"perf.commands.{name}")


if __name__ == "__main__":
    sys.exit(main())
