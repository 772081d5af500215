"""``python -m perf search``: times every plan of the telling cases, and remembers the best."""

from __future__ import annotations

import argparse
import multiprocessing
from concurrent.futures import ProcessPoolExecutor

import torch

from perf.cases import select
from perf.commands import arguments
from perf.runner import Results
from perf.search import search
from triton_bn.plan import Device
from triton_bn.tuning import cache

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    arguments.budget(parser)
    arguments.only(parser)
    arguments.jobs(parser)
    arguments.results(parser)


def run(args: argparse.Namespace) -> int:
    device = Device.current(torch.device("cuda", torch.cuda.current_device()))
    results = Results(args.results / cache.slug(device.name))
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        search(select(args.only), results, device, budget=args.budget, pool=pool)
    return 0
