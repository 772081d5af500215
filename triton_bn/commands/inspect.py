"""``python -m triton_bn inspect``: what the compiler makes of the kernels, without a GPU."""

from __future__ import annotations

import argparse
import json
from itertools import product

import torch

from triton_bn.commands.arguments import CHANNELS_LAST, DTYPES, positive, shape
from triton_bn.inspection.report import (
    RESNET50,
    TARGETS,
    Case,
    compile_all,
    gradient_of,
    plans,
    rows,
    table,
)
from triton_bn.problem import ACTIVATIONS, Activation, describe

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "shape", nargs="*", type=shape, metavar="N,C,...",
        help="an input's, as in 32,64,56,56 (default: ResNet-50's)",
    )  # fmt: skip
    add("--batch", type=positive, default=32, help="of ResNet-50's shapes (default: %(default)s)")
    add("--channels-last", action="store_true", help="instead of contiguous")
    add("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    add("--activation", choices=ACTIVATIONS, help="behind the normalization")
    add("--residual", action="store_true", help="added before the activation")
    add("--eval", action="store_true", help="by running statistics")
    add("--direction", choices=["forward", "backward", "both"], default="both")
    add("--target", choices=list(TARGETS), nargs="+", default=["sm_90"])
    add("--plans", choices=["heuristic", "all"], help="(default: all of one shape, else heuristic)")
    add("--no-instructions", action="store_true", help="do not disassemble: twice as fast")
    add("--jobs", type=positive, help="processes that compile (default: as many as CPUs)")
    add("--json", action="store_true", help="one JSON list of rows instead of a table")


def run(args: argparse.Namespace) -> int:
    """Prints the report; 1 where a kernel spills."""
    activation = Activation.of(args.activation)
    bits = activation is not None and activation.two_slopes and (args.residual or args.eval)
    shapes = args.shape or [(args.batch, *layer[:-1]) for layer in RESNET50]
    search = args.plans == "all" or (args.plans is None and len(args.shape) == 1)
    cases: list[Case] = []
    for target, sizes in product(args.target, shapes):
        x = torch.empty(sizes, dtype=DTYPES[args.dtype], device="meta")
        if args.channels_last and x.dim() in CHANNELS_LAST:
            x = x.to(memory_format=CHANNELS_LAST[x.dim()])
        problem, _ = describe(
            x, training=not args.eval, residual=args.residual, activation=activation, bits=bits
        )
        if args.direction != "backward":
            cases += plans(problem, target, search=search)
        if args.direction != "forward":
            cases += plans(gradient_of(problem), target, search=search)
    found = rows(cases, compile_all(cases, jobs=args.jobs, instructions=not args.no_instructions))
    print(json.dumps(found, indent=1) if args.json else table(found))
    return int(any(row["spilled"] for row in found))
