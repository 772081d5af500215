"""``python -m perf``: measures on this machine's GPU; also ``search``, ``plots``, ``summary``."""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import torch

from perf.cases import select
from triton_bn.plan import Device
from triton_bn.tuning import cache
from triton_bn.tuning.tune import WITHOUT_GPU

__all__ = ["RESULTS", "main"]

RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 2 for a bad command line or without a GPU."""
    parser = argparse.ArgumentParser("python -m perf", description=__doc__)
    add = parser.add_argument
    add("command", nargs="?", default="run", choices=["run", "search", "plots", "summary"])
    add("--budget", type=float, default=math.inf, metavar="SECONDS", help="(default: no end)")
    add(
        "--only", nargs="+", default=[], metavar="WORD",
        help="cases with all of these: a network, shape (256x64x56x56), layout, dtype, op, measure",
    )  # fmt: skip
    add("--again", action="store_true", help="measure known cases again")
    add("--jobs", type=int, default=min(os.cpu_count() or 1, 6), help="processes that compile")
    add("--results", type=Path, default=RESULTS, help=f"(default: {RESULTS})")
    args = parser.parse_args(argv)
    if args.command == "plots":
        from perf.plots import draw_all

        return draw_all(args.results)
    if args.command == "summary":
        from perf.summary import show_all

        return show_all(args.results)
    if not torch.cuda.is_available():
        need = "perf times kernels, so it needs a GPU that PyTorch sees."
        print(need, WITHOUT_GPU, file=sys.stderr)
        return 2
    return measure(args)


def measure(args: argparse.Namespace) -> int:
    from perf.runner import Lab, Results, compile_ahead, run
    from perf.search import search

    gpu = torch.device("cuda", torch.cuda.current_device())
    device = Device.current(gpu)
    results = Results(args.results / cache.slug(device.name))
    cases = select(args.only)
    # What these compile is handed over in the caches on disk. A forked one could not use the GPU.
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        if args.command == "search":
            search(cases, results, device, budget=args.budget, pool=pool)
        else:
            ahead = partial(compile_ahead, pool=pool)
            run(cases, results, Lab(gpu), again=args.again, budget=args.budget, ahead=ahead)
    return 0


if __name__ == "__main__":
    sys.exit(main())
