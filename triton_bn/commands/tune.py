"""``triton-bn tune``: search the fastest plans, remember them, pass them on."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import torch

from triton_bn.commands.arguments import (
    CHANNELS_LAST,
    DTYPES,
    CannotRun,
    add_json,
    add_shapes,
    positive,
    print_json,
    refuse,
    seconds,
)
from triton_bn.functional import batch_norm
from triton_bn.plan import Device
from triton_bn.problem import ACTIVATIONS, Problem
from triton_bn.tuning.memory import export_table, import_table, record, table_path
from triton_bn.tuning.results import Report
from triton_bn.tuning.search import WITHOUT_GPU, Interrupted, search_all

__all__ = ["MODELS", "Case", "add_arguments", "run"]


@dataclass(frozen=True)
class Case:
    """A batch norm to tune: an input's shape, and what follows it."""

    shape: tuple[int, ...]
    activation: str | None = None
    residual: bool = False


#: The distinct batch norms of a model on 224 x 224 images: channels, height = width, what follows.
_BASIC = (
    (64, 112, "relu"), (64, 56, "relu"), (64, 56, "add relu"),
    (128, 28, "relu"), (128, 28, "add relu"), (128, 28, ""),
    (256, 14, "relu"), (256, 14, "add relu"), (256, 14, ""),
    (512, 7, "relu"), (512, 7, "add relu"), (512, 7, ""),
)  # fmt: skip
_BOTTLENECK = (
    (64, 112, "relu"), (64, 56, "relu"), (256, 56, "add relu"), (256, 56, ""),
    (128, 56, "relu"), (128, 28, "relu"), (512, 28, "add relu"), (512, 28, ""),
    (256, 28, "relu"), (256, 14, "relu"), (1024, 14, "add relu"), (1024, 14, ""),
    (512, 14, "relu"), (512, 7, "relu"), (2048, 7, "add relu"), (2048, 7, ""),
)  # fmt: skip

#: The models that the command line knows by name.
MODELS = {
    "resnet18": _BASIC,
    "resnet34": _BASIC,
    "resnet50": _BOTTLENECK,
    "resnet101": _BOTTLENECK,
    "resnet152": _BOTTLENECK,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time every plan for some batch norms, forward and backward in training, and remember the "
        "fastest for this GPU. Without a shape, --model, --export and --import: ResNet-50's."
    )
    group = parser.add_argument_group("what to tune")
    what = group.add_argument
    add_shapes(group, "any number")
    what("--activation", choices=sorted(ACTIVATIONS), help="behind each shape")
    what("--residual", action="store_true", help="added before the activation of each shape")
    what("--model", choices=sorted(MODELS), help="the batch norms of a model on 224 x 224 images")
    what("--batch", type=positive, help="images for --model (default: 32)")
    what("--dtype", choices=DTYPES, default="bfloat16", help="(default: %(default)s)")
    what("--channels-last", action="store_true", help="instead of contiguous")
    how = parser.add_argument_group("how").add_argument
    how("--budget", type=seconds, metavar="SECONDS", help="for all of it; the largest come first")
    how("--again", action="store_true", help="time also what was tuned before")
    how("--table", action="store_true", help="print every candidate, not the best alone")
    add_json(parser)
    files = parser.add_argument_group("files").add_argument
    files("--export", metavar="FILE", help="write what is remembered for this GPU")
    files("--import", dest="source", metavar="FILE", help="first add an exported table")


def _cases(args: argparse.Namespace) -> list[Case]:
    """What the arguments ask to tune."""
    cases = [Case(sizes, args.activation, args.residual) for sizes in args.shapes]
    name = args.model
    if not cases:
        refuse(args, "activation", "residual", without="a shape")
    if name is None and not cases and not args.source and not args.export:
        name = "resnet50"
    if name is None:
        refuse(args, "batch", without="--model")
    if name is None and not cases:
        flags = ("channels_last", "budget", "again", "table", "json")
        refuse(args, *flags, without="something to tune")
    for channels, size, then in MODELS[name] if name else ():
        activation = "relu" if "relu" in then else None
        cases.append(Case((args.batch or 32, channels, size, size), activation, "add" in then))
    if args.channels_last and any(len(case.shape) not in CHANNELS_LAST for case in cases):
        raise CannotRun("--channels-last needs shapes of 4 or 5 sizes")
    return cases


def _problems_met(
    case: Case, args: argparse.Namespace, gpu: torch.device
) -> list[tuple[Problem, Device]]:
    """The problems of a case in a training step."""
    dtype = DTYPES[args.dtype]
    layout = CHANNELS_LAST[len(case.shape)] if args.channels_last else torch.contiguous_format
    x = torch.randn(case.shape, device=gpu, dtype=dtype).to(memory_format=layout).requires_grad_()
    residual = torch.randn_like(x).requires_grad_() if case.residual else None
    own = torch.promote_types(dtype, torch.float32)
    mean, var, weight, bias = torch.ones(4, case.shape[1], device=gpu, dtype=own).unbind()
    weight, bias = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    with record() as seen:
        y = batch_norm(
            x, mean, var, weight, bias, True, residual=residual, activation=case.activation
        )
        y.backward(torch.ones_like(y))
    return list(seen)


def run(args: argparse.Namespace) -> int:
    try:
        if args.source:
            _say(f"{import_table(args.source)} plans imported from {args.source}", args)
        cases = _cases(args)
        if not cases and not args.export:
            return 0
        gpu = _gpu()
        if gpu is None:
            raise CannotRun(f"tune times kernels, so PyTorch must see a GPU. {WITHOUT_GPU}")
        if cases:
            report, interrupted = _search(cases, args, gpu)
            if args.json:
                print_json(report.as_rows())
            else:
                print(report if args.table else report.summary())
            _say(f"\nkept in {table_path(Device.current(gpu))}", args)
            if interrupted:
                print("interrupted: what was found until then is kept", file=sys.stderr)
                return 130
        if args.export:
            count = export_table(args.export, Device.current(gpu))
            _say(f"{count} plans exported to {args.export}", args)
    except (ValueError, RuntimeError, OSError) as error:
        raise CannotRun(str(error)) from error
    return 0


def _say(text: str, args: argparse.Namespace) -> None:
    print(text, file=sys.stderr if args.json else sys.stdout)


def _gpu() -> torch.device | None:
    if not torch.cuda.is_available():
        return None
    return torch.device("cuda", torch.cuda.current_device())


def _search(cases: list[Case], args: argparse.Namespace, gpu: torch.device) -> tuple[Report, bool]:
    """What was found, and whether Ctrl-C ended it."""
    met: dict[tuple[Problem, Device], None] = {}
    for case in cases:
        met |= dict.fromkeys(_problems_met(case, args, gpu))
    try:
        return search_all(met, again=args.again, budget=args.budget), False
    except Interrupted as error:
        return error.report, True
