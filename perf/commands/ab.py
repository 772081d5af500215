"""``python -m perf ab``: the A/B comparisons of :mod:`perf.ab`, and how long programs wait for one another."""

from __future__ import annotations

import argparse
import time

import torch

from perf import wait
from perf.ab import QUESTIONS
from perf.commands import arguments
from perf.runner import Lab, Results, run_cases
from perf.visit import BROKEN
from triton_bn.plan import Device
from triton_bn.tuning import cache

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = ["wait", *(question.name for question in QUESTIONS)]
    parser.add_argument(
        "--only", nargs="+", default=names, choices=names, metavar="QUESTION",
        help=f"some of: {', '.join(names)}",
    )  # fmt: skip
    parser.add_argument("--again", action="store_true", help="measure known cases again")
    arguments.budget(parser)
    arguments.results(parser)


def run(args: argparse.Namespace) -> int:
    deadline = time.monotonic() + args.budget
    gpu = torch.device("cuda", torch.cuda.current_device())
    device = Device.current(gpu)
    results = Results(args.results / cache.slug(device.name))
    try:
        if "wait" in args.only:
            wait.measure_all(results, device, again=args.again)
        for question in QUESTIONS:
            left = deadline - time.monotonic()
            if question.name in args.only and left > 0:
                print(f"{question.name}: {question.why}", flush=True)
                lab = Lab(gpu, question.providers)
                run_cases(question.cases, results, lab, again=args.again, budget=left)
    except torch.AcceleratorError as error:
        print(f"the GPU's context is broken, run again to go on behind this case: {error}")
        return BROKEN
    return 0
