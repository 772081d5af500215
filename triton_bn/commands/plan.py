"""``python -m triton_bn plan``: the plans that a batch norm would run under, here or elsewhere."""

from __future__ import annotations

import argparse

import torch

from triton_bn.commands.arguments import CHANNELS_LAST, DTYPES, shape
from triton_bn.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from triton_bn.plan import DEVICES, Device
from triton_bn.problem import ACTIVATIONS

__all__ = ["add_arguments", "run"]

LAYERS = {2: BatchNorm1d, 3: BatchNorm1d, 4: BatchNorm2d, 5: BatchNorm3d}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    here = torch.cuda.is_available()
    parser.add_argument(
        "shape", type=shape, metavar="N,C,...", help="the input's, as in 32,64,56,56"
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument("--channels-last", action="store_true", help="instead of contiguous")
    parser.add_argument("--activation", choices=ACTIVATIONS, help="behind the normalization")
    parser.add_argument("--residual", action="store_true", help="added before the activation")
    parser.add_argument("--eval", action="store_true", help="by running statistics")
    parser.add_argument(
        "--device",
        choices=DEVICES,
        default=None if here else "H200",
        help="default: " + ("this machine's GPU" if here else "%(default)s, with no GPU here"),
    )


def run(args: argparse.Namespace) -> int:
    device = DEVICES[args.device] if args.device else Device.current(torch.device("cuda"))
    x = torch.empty(args.shape, dtype=DTYPES[args.dtype], device="meta")
    if args.channels_last and x.dim() in CHANNELS_LAST:
        x = x.to(memory_format=CHANNELS_LAST[x.dim()])
    layer = LAYERS[x.dim()](x.shape[1], activation=args.activation, device="meta")
    layer.train(not args.eval)
    cache = f"{device.cache >> 20} MiB of L2"
    print(f"{device.name} ({device.arch}), {device.processors} processors, {cache}")
    print(layer.plan(x, x if args.residual else None, device=device))
    return 0
