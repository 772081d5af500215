"""``triton-bn check``: errors of ours and of torch.nn's batch norm against float64.

One training step for each shape, layout and dtype; the parameters are float32, or float64 beside
float64 inputs. Ours may lose what :mod:`triton_bn.oracle` says that floats lose, and no more.
Torch's is shown, not judged.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from triton_bn.commands.arguments import (
    CHANNELS_LAST,
    DTYPES,
    CannotRun,
    add_json,
    add_shapes,
    example,
    print_json,
)
from triton_bn.modules import BatchNorm1d, BatchNorm2d, BatchNorm3d
from triton_bn.oracle import Bounded, batch_norm, observe
from triton_bn.route import INTERPRETED

__all__ = ["add_arguments", "run"]

#: Prime, ragged and tiny shapes, and some of the usual.
SMALL = ((3, 2), (64, 10), (5, 7, 11), (32, 3, 4, 4), (6, 5, 3, 13), (8, 16, 7, 7), (2, 3, 4, 3, 5))
#: Those that only a GPU is asked for.
LARGE = (
    (8192, 1024),
    (32, 64, 112, 112),
    (64, 256, 56, 56),
    (128, 2048, 7, 7),
    (4, 32, 24, 64, 64),
)

#: The results that are compared, and their columns.
HEADERS = {
    "y": "y",
    "dx": "dx",
    "dweight": "dweight",
    "dbias": "dbias",
    "running_mean": "mean",
    "running_var": "var",
}

LAYERS: dict[int, tuple[type[nn.modules.batchnorm._BatchNorm], ...]] = {
    2: (BatchNorm1d, nn.BatchNorm1d),
    3: (BatchNorm1d, nn.BatchNorm1d),
    4: (BatchNorm2d, nn.BatchNorm2d),
    5: (BatchNorm3d, nn.BatchNorm3d),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_shapes(parser, "default: a list of usual and of odd ones")
    add = parser.add_argument
    add("--dtype", choices=DTYPES, action="append", help="instead of all; repeatable")
    add(
        "--offset",
        type=float,
        default=1.0,
        metavar="SIGMAS",
        help="mean of each channel, in its standard deviations (default: %(default)s)",
    )
    add_json(parser)


class Error(NamedTuple):
    """The largest error of one result: ours, torch's, and ours as a multiple of what is allowed."""

    ours: float
    torch: float
    ratio: float


def run(args: argparse.Namespace) -> int:
    gpu = torch.cuda.is_available()
    device = torch.device("cuda" if gpu else "cpu")
    shapes = args.shapes or (SMALL + LARGE if gpu else SMALL)
    for sizes in shapes:
        if math.prod(sizes) == sizes[1]:
            raise CannotRun(f"more than 1 value per channel is needed, but got {sizes}")
    say = _nothing if args.json else print
    say(f"{_where(device)} against float64; in each cell the largest error: ours torch's\n")
    say(" " * 11 + "".join(f"{header:^12}" for header in HEADERS.values()).rstrip())
    rows: list[dict[str, Any]] = []
    for sizes in shapes:
        for layout in ("contiguous", "channels_last"):
            if layout == "channels_last" and len(sizes) not in CHANNELS_LAST:
                continue
            say(f"{sizes} {layout}")
            for name in args.dtype or DTYPES:
                example(sizes, name, layout == "channels_last")
                try:
                    errors = errors_of(sizes, layout, DTYPES[name], args.offset, device)
                except (torch.OutOfMemoryError, MemoryError) as error:
                    raise CannotRun(f"not enough memory for {sizes} of {name}: {error}") from error
                say(f"  {name:8}" + "".join(_cells(errors)), flush=True)
                case = {"shape": sizes, "layout": layout, "dtype": name}
                rows += [
                    {**case, "result": what, **error._asdict(), "right": error.ratio <= 1}
                    for what, error in errors.items()
                ]
    wrong = sum(not row["right"] for row in rows)
    say(f"\n{len(rows) - wrong} results within what their dtype may lose, {wrong} beyond it")
    if args.json:
        print_json(rows)
    return 1 if wrong else 0


def _nothing(*text: str, flush: bool = False) -> None:
    pass


def errors_of(
    sizes: tuple[int, ...], layout: str, dtype: torch.dtype, offset: float, device: torch.device
) -> dict[str, Error]:
    """Errors of one training step on random numbers, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    channels = sizes[1]
    vector = (channels, *[1] * (len(sizes) - 2))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    memory_format = (
        CHANNELS_LAST[len(sizes)] if layout == "channels_last" else torch.contiguous_format
    )
    deviation = random(*vector).exp()
    x = (random(*sizes) + offset) * deviation
    x, dy = (
        t.to(device, dtype).contiguous(memory_format=memory_format) for t in (x, random(*sizes))
    )
    like = torch.float64 if dtype == torch.float64 else torch.float32
    state = {
        "weight": 1 + random(channels) / 4,
        "bias": random(channels),
        "running_mean": random(channels),
        "running_var": random(channels).exp(),
    }
    state = {name: t.to(device, like) for name, t in state.items()}
    found = []
    for layer_type in LAYERS[len(sizes)]:
        layer = layer_type(channels, device=device, dtype=like)
        layer.load_state_dict(state, strict=False)
        found.append(observe(_alone(layer), layer, x, dy))
    exact = batch_norm(
        x, state["running_mean"], state["running_var"], state["weight"], state["bias"],
        training=True, dy=dy, interpreted=INTERPRETED,
    )  # fmt: skip
    return {
        name: Error(
            _largest(found[0].get(name), exact[name]),
            _largest(found[1].get(name), exact[name]),
            exact[name].ratio(found[0].get(name)),
        )
        for name in HEADERS
    }


def _alone(layer: nn.Module) -> Callable[[Tensor, Tensor | None], Tensor]:
    def call(x: Tensor, residual: Tensor | None) -> Tensor:
        y: Tensor = layer(x)
        return y

    return call


def _largest(actual: Tensor | None, exact: Bounded) -> float:
    if actual is None or actual.shape != exact.value.shape:
        return math.inf
    return (actual.detach().double().cpu() - exact.value).abs().max().item()


def _where(device: torch.device) -> str:
    if INTERPRETED:
        return "the kernels in Triton's interpreter"
    if device.type == "cuda":
        return f"the kernels on {torch.cuda.get_device_name(device)}"
    return "PyTorch's own operators (TRITON_INTERPRET=1 runs the kernels)"


def _cells(errors: dict[str, Error]) -> Iterator[str]:
    for error in errors.values():
        text = f"{_short(error.ours)} {_short(error.torch)}"
        good = error.ratio <= 1
        text = f"{text:>11}" + (" " if good else "!")
        yield text if good or not _colored() else f"\x1b[1;31m{text}\x1b[0m"


def _short(value: float) -> str:
    """Two or three characters of what matters: ``3e-7``."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    mantissa, exponent = f"{value:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def _colored() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ
