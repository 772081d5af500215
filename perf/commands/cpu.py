"""``python -m perf cpu``: converted models and layers on CPU tensors beside stock ones, in one run.

PyTorch's own operators compute there, so a ratio says what the way to them costs. Timed is the processor time
of one thread, call by call in turns (stock, converted, layer, stock, ...), and reported the ratio of medians.
A row is printed only where all results are the stock ones to the last bit.
"""

from __future__ import annotations

import argparse
import copy
import math
import statistics
import time
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

import triton_bn
from triton_bn.route import INTERPRETED

__all__ = ["add_arguments", "run"]

#: A large and a small batch; of the small one the time is mostly that of the calls themselves.
SHAPES = ((16, 64, 56, 56), (16, 256, 14, 14), (2, 16, 4, 4))
OPS = ("bn", "bn+relu", "bn+add+relu")


class Stock(nn.Module):
    """Batch norm, addition and ReLU, as a model calls them."""

    def __init__(self, channels: int, op: str) -> None:
        super().__init__()
        self.bn, self.op, self.relu = nn.BatchNorm2d(channels), op, nn.ReLU()

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = self.bn(x)
        if self.op == "bn+add+relu":
            y = y + residual
        return y if self.op == "bn" else self.relu(y)


class Layer(nn.Module):
    """The same by one call of a layer that was built with its activation."""

    def __init__(self, channels: int, op: str) -> None:
        super().__init__()
        self.bn = triton_bn.BatchNorm2d(channels, activation=None if op == "bn" else "relu")
        self.op = op

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.bn(x, residual if self.op == "bn+add+relu" else None)  # type: ignore[no-any-return]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=25, help="calls of each, in turns (25)")


def run(args: argparse.Namespace) -> int:
    if INTERPRETED:
        print("perf cpu times PyTorch's operators: unset TRITON_INTERPRET")
        return 2
    torch.set_num_threads(1)
    print(f"PyTorch {torch.__version__}, one thread, medians of {args.rounds}: ratios to stock")
    print(
        f"{'shape':16} {'layout':14} {'dtype':9} {'':12} {'pass':7} {'stock ms':>9} converted layer"
    )
    ratios: list[list[float]] = [[], []]
    for shape, last, dtype, op, backward in product(
        SHAPES, (False, True), (torch.float32, torch.bfloat16), OPS, (False, True)
    ):
        medians = _medians(shape, last, dtype, op, backward, args.rounds)
        own = [median / medians[0] for median in medians[1:]]
        for kept, ratio in zip(ratios, own, strict=True):
            kept.append(ratio)
        layout = "channels_last" if last else "contiguous"
        text = "fw+bw" if backward else "fw"
        name = "x".join(map(str, shape))
        kind = str(dtype).removeprefix("torch.")
        print(
            f"{name:16} {layout:14} {kind:9} {op:12} {text:7} {1e3 * medians[0]:9.3f} "
            f"{own[0]:9.2f} {own[1]:5.2f}",
            flush=True,
        )
    means = [math.exp(statistics.fmean(map(math.log, kept))) for kept in ratios]
    largest = [max(kept) for kept in ratios]
    print(
        f"geometric mean: converted {means[0]:.2f}, layer {means[1]:.2f}; "
        f"largest: {largest[0]:.2f}, {largest[1]:.2f}"
    )
    return 0


def _medians(
    shape: tuple[int, ...], last: bool, dtype: torch.dtype, op: str, backward: bool, rounds: int
) -> list[float]:
    """Seconds of stock, converted and layer, which must agree to the last bit."""
    torch.manual_seed(0)
    stock = Stock(shape[1], op)
    models = [stock, triton_bn.convert(copy.deepcopy(stock)), Layer(shape[1], op)]
    form = torch.channels_last if last else torch.contiguous_format
    x, residual, dy = (torch.randn(shape).to(dtype).to(memory_format=form) for _ in range(3))
    x.requires_grad_(backward)
    residual.requires_grad_(backward)
    calls = [_call(model, x, residual, dy, backward) for model in models]
    want, *others = [call() for call in calls]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(other, want, strict=True)), "other results"
    repeat = 1 if x.numel() > 10_000 else 20
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(rounds):
        for call, taken in zip(calls, times, strict=True):
            begin = time.process_time()
            for _ in range(repeat):
                call()
            taken.append((time.process_time() - begin) / repeat)
    return [statistics.median(taken) for taken in times]


def _call(
    model: nn.Module, x: Tensor, residual: Tensor, dy: Tensor, backward: bool
) -> Callable[[], list[Tensor]]:
    wanted = [x, *model.parameters()]

    def call() -> list[Tensor]:
        if not backward:
            with torch.no_grad():
                return [model(x, residual)]
        y = model(x, residual)
        return [y.detach(), *torch.autograd.grad(y, wanted, dy)]

    return call
