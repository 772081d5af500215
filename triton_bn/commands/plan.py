"""``triton-bn plan``: the plans that a batch norm would run under, here or elsewhere, and why."""

from __future__ import annotations

import argparse

import torch

from triton_bn.commands.arguments import (
    CannotRun,
    add_call,
    add_device,
    add_json,
    add_shapes,
    device_here,
    example,
    print_json,
)
from triton_bn.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from triton_bn.plan import Plans

__all__ = ["add_arguments", "run"]

LAYERS = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shapes(parser, "one or more", nargs="+")
    add_call(parser)
    add_device(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    found = [_plans(sizes, args) for sizes in args.shapes]
    if args.json:
        print_json([row for plans in found for row in plans.as_rows()])
    else:
        print("\n\n".join(map(str, found)))
    return 0


def _plans(sizes: tuple[int, ...], args: argparse.Namespace) -> Plans:
    x = example(sizes, args.dtype, args.channels_last)
    own = torch.promote_types(x.dtype, torch.float32)
    layer = LAYERS[x.dim()](x.shape[1], activation=args.activation, device="meta", dtype=own)
    layer.train(not args.eval)
    try:
        return layer.plan(x, x if args.residual else None, device=args.device or device_here())
    except ValueError as error:
        raise CannotRun(str(error)) from error
