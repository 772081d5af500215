"""``python -m perf host``: what a layer's call costs the host beside torch.nn's; no GPU needed.

Timed is the processor time of this thread, of batches of calls in turns, on a tensor so small that arithmetic
does not count: torch's is in its time. Kernels are compiled for an H200 and launched by a driver that does
nothing (:mod:`perf.idle`), so a GPU adds to ours the launch in C, and to torch's its launches. A ratio is
that of minima; other work on the machine moves medians more.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import triton_bn
from perf.runner import COLUMNS, Results, Row, about
from triton_bn.route import INTERPRETED, TRITON

__all__ = ["add_arguments", "run"]

SHAPE = (4, 16, 4, 4)


class Timed(NamedTuple):
    """Calls side by side: torch's, and ours, under a driver or the usual plan; ``target``: of their ratio."""

    measure: str
    op: str
    provider: str
    driver: str | None
    target: float | None


TIMED = (
    Timed("forward", "bn", "triton_bn", None, None),
    Timed("host", "bn", "triton_bn", None, 1.3),
    Timed("host", "bn+relu", "triton_bn", None, 1.3),
    Timed("host", "bn+add+relu", "triton_bn", None, 1.3),
    Timed("forward", "bn", "triton_bn split", "split", None),
    Timed("host", "bn", "triton_bn split", "split", 1.6),
    Timed("eval", "bn", "triton_bn", None, 1.5),
)
TITLES = {"forward": "forward", "host": "forward+backward", "eval": "evaluation"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=25, help="batches of each, in turns (25)")
    parser.add_argument("--calls", type=int, default=60, help="calls of a batch (60)")
    parser.add_argument(
        "--output", type=Path, help="a folder for the rows, of which `plots` draws the picture"
    )


def run(args: argparse.Namespace) -> int:
    if INTERPRETED or not TRITON:
        print("perf host needs Triton, without TRITON_INTERPRET=1")
        return 2
    from perf.idle import Driver, idle

    torch.set_num_threads(1)
    with idle(Driver()):
        times = measure(args.rounds, args.calls)
    print(f"thread CPU time of a call on {SHAPE}, us: minimum (median) of {args.rounds} batches")
    print(f"{'':18}{'op':13}{'plan':12}{'ours':>16}{'torch.nn':>16}{'ratio':>7}{'target':>8}")
    for timed, (ours, theirs) in times.items():
        ratio = min(ours) / min(theirs)
        own, other = (
            f"{1e6 * min(t):.1f} ({1e6 * statistics.median(t):.1f})" for t in (ours, theirs)
        )
        target = "" if timed.target is None else f"<= {timed.target}"
        name = f"{TITLES[timed.measure]:18}{timed.op:13}{timed.driver or 'resident':12}"
        print(f"{name}{own:>16}{other:>16}{ratio:>7.2f}{target:>8}")
    if args.output is not None:
        Results(args.output).add(rows(times))
    return 0


def measure(rounds: int, calls: int) -> dict[Timed, tuple[list[float], list[float]]]:
    """Seconds a call: ours and torch's, batch by batch."""
    pairs = {timed: (_call(timed, ours=True), _call(timed, ours=False)) for timed in TIMED}
    times: dict[Timed, tuple[list[float], list[float]]] = {timed: ([], []) for timed in TIMED}

    def batch(call: Callable[[], Any], n: int) -> float:
        start = time.thread_time()
        for _ in range(n):
            call()
        return (time.thread_time() - start) / n

    gc.disable()
    for n in range(-1, rounds):
        gc.collect()
        for timed, both in pairs.items():
            # Who runs first in a round runs second in the next.
            for who in (0, 1) if n % 2 else (1, 0):
                with _under(timed.driver if who == 0 else None):
                    seconds = batch(both[who], calls)
                if n >= 0:  # the first round compiles
                    times[timed][who].append(seconds)
    gc.enable()
    return times


def _under(driver: str | None) -> Any:
    """A driver in the place of the usual plan, without the cost of asking for it at every call."""
    if driver is None:
        return nullcontext()
    from unittest import mock

    from triton_bn.plan import candidates
    from triton_bn.tuning import memory

    plans = {
        key: next((plan for plan in candidates(*key) if plan.driver == driver), usual)
        for key, usual in memory.memo.items()
    }
    return mock.patch.dict(memory.memo, plans)


def _call(timed: Timed, *, ours: bool) -> Callable[[], Any]:
    """A training or evaluation call of a layer with what follows it."""
    training = timed.measure != "eval"
    x, residual = (torch.randn(SHAPE, requires_grad=training) for _ in range(2))
    dy, add, relu = torch.randn(SHAPE), "add" in timed.op, "relu" in timed.op
    layer: Any = nn.BatchNorm2d(SHAPE[1])
    if ours:
        layer = triton_bn.BatchNorm2d(SHAPE[1], activation="relu" if relu else None)
    layer.train(training)

    def forward() -> Tensor:
        if ours:
            return layer(x, residual) if add else layer(x)  # type: ignore[no-any-return]
        y = layer(x) + residual if add else layer(x)
        return F.relu(y) if relu else y  # type: ignore[no-any-return]

    leaves = [x, layer.weight, layer.bias, *([residual] if add else [])]

    def both() -> Any:
        return torch.autograd.grad(forward(), leaves, dy)

    def evaluate() -> Tensor:
        with torch.no_grad():
            return forward()

    return {"forward": forward, "host": both, "eval": evaluate}[timed.measure]


def rows(times: dict[Timed, tuple[list[float], list[float]]]) -> list[Row]:
    """Those of forward + backward, as ``plots`` reads them."""
    found = []
    for timed, both in times.items():
        if timed.measure != "host":
            continue
        for provider, seconds in zip((timed.provider, "torch eager"), both, strict=True):
            if provider != timed.provider and timed.driver is not None:
                continue  # torch's is there already
            fifths = statistics.quantiles(seconds, n=5, method="inclusive")
            row: Row = dict.fromkeys(COLUMNS)
            row |= about(torch.device("cpu"))
            row |= {
                "question": "", "network": "", "shape": "x".join(map(str, SHAPE)), "layout": "contiguous",
                "dtype": "float32", "op": timed.op, "measure": "host", "provider": provider,
                "status": "measured", "plan": timed.driver or "", "n": len(seconds),
                "ms": 1e3 * statistics.median(seconds), "p20_ms": 1e3 * fifths[0], "p80_ms": 1e3 * fifths[3],
                "gpu": "no GPU (launches left out)", "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            }  # fmt: skip
            found.append(row)
    return found
