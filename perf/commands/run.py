"""``python -m perf run``, or ``python -m perf`` alone: the benchmark, the most telling cases first."""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import torch

from perf.cases import select
from perf.commands import arguments
from perf.runner import Lab, Results, compile_ahead, run_cases
from perf.visit import BROKEN
from triton_bn.plan import Device
from triton_bn.tuning import cache

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.budget(parser)
    arguments.only(parser)
    parser.add_argument("--again", action="store_true", help="measure known cases again")
    arguments.jobs(parser)
    arguments.results(parser)


def run(args: argparse.Namespace) -> int:
    gpu = torch.device("cuda", torch.cuda.current_device())
    results = Results(args.results / cache.slug(Device.current(gpu).name))
    # What these compile is handed over in the caches on disk. A forked one could not use the GPU.
    pool = ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"))
    try:
        ahead = partial(compile_ahead, pool=pool)
        run_cases(
            select(args.only), results, Lab(gpu), again=args.again, budget=args.budget, ahead=ahead
        )
    except torch.AcceleratorError as error:
        print(f"the GPU's context is broken, run again to go on behind this case: {error}")
        return BROKEN
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return 0
