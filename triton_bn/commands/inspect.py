"""``triton-bn inspect``: what the compiler makes of the kernels, without a GPU."""

from __future__ import annotations

import argparse
import sys
from itertools import product

from triton_bn.commands.arguments import (
    CannotRun,
    add_call,
    add_device,
    add_json,
    add_shapes,
    device_here,
    example,
    positive,
    print_json,
    refuse,
)
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
from triton_bn.plan import Device
from triton_bn.problem import Activation, describe

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shapes(parser, "default: ResNet-50's")
    add_call(parser)
    add_device(parser, action="append")
    add = parser.add_argument
    add("--batch", type=positive, help="of ResNet-50's shapes (default: 32)")
    add("--direction", choices=["forward", "backward", "both"], default="both")
    add("--plans", choices=["heuristic", "all"], help="default: all of one shape, else heuristic")
    add("--no-instructions", action="store_true", help="do not disassemble: twice as fast")
    add("--jobs", type=positive, help="processes that compile (default: as many as CPUs)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the report; 1 where a kernel spills or does not compile."""
    activation = Activation.of(args.activation)
    bits = activation is not None and activation.two_slopes and not activation.output_tells
    bits = bits and (args.residual or args.eval)
    if args.shapes:
        refuse(args, "batch", without="ResNet-50's shapes")
    shapes = args.shapes or [(args.batch or 32, *layer[:-1]) for layer in RESNET50]
    search = args.plans == "all" or (args.plans is None and len(args.shapes) == 1)
    targets = dict.fromkeys(map(_target, args.device or [device_here()]))
    cases: list[Case] = []
    for target, sizes in product(targets, shapes):
        problem, _ = describe(
            example(sizes, args.dtype, args.channels_last),
            training=not args.eval,
            residual=args.residual,
            activation=activation,
            bits=bits,
        )
        if args.direction != "backward":
            cases += plans(problem, target, search=search)
        if args.direction != "forward":
            cases += plans(gradient_of(problem), target, search=search)
    try:
        facts = compile_all(cases, jobs=args.jobs, instructions=not args.no_instructions)
    except RuntimeError as error:
        print(f"a plan does not compile: {error}", file=sys.stderr)
        return 1
    found = rows(cases, facts)
    if args.json:
        print_json(found)
    else:
        print(table(found))
    return int(any(row["spilled"] for row in found))


def _target(device: Device) -> str:
    """What is compiled for a GPU."""
    if device.arch not in TARGETS:
        raise CannotRun(
            f"kernels are compiled for {', '.join(TARGETS)} here, but {device.name} is {device.arch}: "
            "name another GPU (--device)"
        )
    return device.arch
