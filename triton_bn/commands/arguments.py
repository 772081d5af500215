"""What the commands' arguments have in common: how a shape, a GPU and a batch norm are written.

============  ==================================================================================
argument      is
============  ==================================================================================
``SHAPE``     an input's sizes, ``32,64,56,56`` or ``32x64x56x56``; where several may be given, they
              stand beside one another: ``check 32,64 8x16x7x7``
``--device``  a GPU, by its name (``H100``) or its architecture (``sm_90``); it need not be here
``--json``    one JSON document instead of tables; what else there is to say goes to stderr
============  ==================================================================================
"""

from __future__ import annotations

import argparse
import json
import re
from typing import Any

import torch
from torch import Tensor

from triton_bn.plan import DEVICES, Device
from triton_bn.problem import ACTIVATIONS

__all__ = [
    "CHANNELS_LAST",
    "DTYPES",
    "CannotRun",
    "add_call",
    "add_device",
    "add_json",
    "add_shapes",
    "device_here",
    "example",
    "positive",
    "print_json",
    "refuse",
    "seconds",
    "shape",
]

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}

#: The channels_last format of a tensor of so many dimensions.
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class CannotRun(Exception):
    """What was asked cannot be done here: the command line prints it and exits with 2."""


# ---- one argument's text, for argparse's ``type=``


def shape(text: str) -> tuple[int, ...]:
    """``"32,64,56,56"`` or ``"32x64x56x56"`` as an input's shape."""
    sizes = [int(size) if size.isdecimal() else 0 for size in re.split("[,x]", text)]
    if not 2 <= len(sizes) <= 5 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            "expected N,C or N,C,L or N,C,H,W or N,C,D,H,W (32,64,56,56 or 32x64x56x56), "
            f"but got {text!r}"
        )
    return tuple(sizes)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive whole number, but got {text!r}")
    return int(text)


def seconds(text: str) -> float:
    """A length of time from 0 on."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number of seconds, but got {text!r}")
    return value


def _device(text: str) -> Device:
    try:
        return Device.named(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


# ---- arguments that several commands take


def add_shapes(parser: Any, default: str, nargs: str = "*") -> None:
    parser.add_argument(
        "shapes",
        type=shape,
        nargs=nargs,
        metavar="SHAPE",
        help=f"an input's, as in 32,64,56,56 or 32x64x56x56 ({default})",
    )


def add_device(parser: Any, **options: Any) -> None:
    here = device_here()
    parser.add_argument(
        "--device",
        type=_device,
        metavar="GPU",
        help=f"{', '.join(DEVICES)}, or an architecture, as in sm_90; it need not be here "
        f"(default: {here.name}{', with no GPU here' if not torch.cuda.is_available() else ''})",
        **options,
    )


def add_call(parser: Any) -> None:
    """The batch norm that is called."""
    add = parser.add_argument
    add("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    add("--channels-last", action="store_true", help="instead of contiguous")
    add("--activation", choices=ACTIVATIONS, help="behind the normalization")
    add("--residual", action="store_true", help="added before the activation")
    add("--eval", action="store_true", help="by running statistics")


def add_json(parser: Any) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON document instead of tables")


# ---- what they mean


def device_here() -> Device:
    """The GPU that ``--device`` stands for by default: this machine's, and where there is none an H200."""
    return Device.current(torch.device("cuda")) if torch.cuda.is_available() else DEVICES["H200"]


def example(
    sizes: tuple[int, ...], dtype: str, channels_last: bool, device: str = "meta"
) -> Tensor:
    """An input without values, of a shape, dtype and memory format."""
    if channels_last and len(sizes) not in CHANNELS_LAST:
        raise CannotRun(f"--channels-last is for N,C,H,W and N,C,D,H,W, but got {sizes}")
    layout = CHANNELS_LAST[len(sizes)] if channels_last else torch.contiguous_format
    try:
        return torch.empty(sizes, dtype=DTYPES[dtype], device="meta", memory_format=layout)
    except (RuntimeError, TypeError) as error:  # more values than can be counted
        raise CannotRun(f"there is no tensor of shape {sizes}: {error}".splitlines()[0]) from error


def refuse(args: argparse.Namespace, *flags: str, without: str) -> None:
    """Refuses flags that have no meaning here, and names what they belong to."""
    for flag in flags:
        if getattr(args, flag) not in (None, False):
            raise CannotRun(f"--{flag.replace('_', '-')} has no meaning without {without}")


def print_json(data: Any) -> None:
    print(json.dumps(data, indent=1))
