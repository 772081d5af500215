"""``triton-bn demo``: trains on scanned digits beside torch.nn.BatchNorm2d, and shows it.

The work is in :mod:`triton_bn.demo.digits`, what is judged in :mod:`triton_bn.demo.lockstep`. The drift
between the two trainings is shown, not judged.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from triton_bn.commands.arguments import CannotRun, add_json, positive, print_json
from triton_bn.demo.digits import Training, load
from triton_bn.demo.lockstep import Difference
from triton_bn.demo.picture import NAMES, draw
from triton_bn.route import INTERPRETED

__all__ = ["add_arguments", "run"]

#: The results that are compared, by their columns' headers.
_HEADERS = {
    "y": "y",
    "dx": "dx",
    "dresidual": "dresidual",
    "dweight": "dweight",
    "dbias": "dbias",
    "running_mean": "mean",
    "running_var": "var",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--epochs",
        type=positive,
        default=2 if INTERPRETED else 10,
        help="default: 10, in Triton's interpreter 2",
    )
    parser.add_argument("--batch", type=positive, default=64, help="default: %(default)s")
    parser.add_argument(
        "--limit", type=positive, metavar="N", help="train on N images only (default: all 1437)"
    )
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("triton_bn_demo.png"),
        metavar="FILE",
        help="where the picture goes (default: %(default)s)",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    try:
        import matplotlib as _mpl  # noqa: F401
        import sklearn as _sklearn  # noqa: F401
        from rich.console import Console
        from rich.progress import track
    except ImportError as error:
        raise CannotRun(f'{error}; the demo needs: pip install "triton_bn[demo]"') from error
    if not args.output.parent.is_dir():
        raise CannotRun(f"--output: there is no folder {args.output.parent}")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(1)  # the tensors are so small that threads would wait for one another
    console = Console(highlight=False, soft_wrap=True, stderr=args.json)
    console.print(f"[bold]scanned digits, two networks, the same weights[/], on {_where(device)}")
    training = Training(*load(args.limit, device), args.epochs, args.batch, args.seed)
    for _ in track(training.steps(), "training", training.total, console=console, transient=True):
        pass
    _print(console, training)
    draw(
        args.output, _where(device), training.loss, training.accuracy, training.worst,
        *training.test, training.read,
    )  # fmt: skip
    console.print(f"picture: {args.output}\n")
    if args.json:
        print_json(_summary(training))
    return _verdict(console, training)


def _summary(training: Training) -> dict[str, Any]:
    """The tables as data; ``worst`` in multiples of what float32 may lose."""
    return {
        "agree": training.ratio <= 1,
        "seconds": training.seconds,
        "loss": training.loss,
        "accuracy": training.accuracy,
        "worst": [
            {"layer": layer, "layout": layout, "result": name, **difference._asdict()}
            for (layer, layout), row in training.worst.items()
            for name, difference in row.items()
        ],
        "plans": [
            {"layer": layer, "layout": layout, **row}
            for (layer, layout), plans in training.plans.items()
            for row in plans.as_rows()
        ],
    }


def _where(device: torch.device) -> str:
    if INTERPRETED:
        return "Triton's interpreter"
    return f"{torch.cuda.get_device_name(device)}" if device.type == "cuda" else "plain torch (CPU)"


def _verdict(console: Any, training: Training) -> int:
    """Prints who is right, and returns the exit code."""
    console.print(
        "largest differences from torch, given the same: "
        f"output {training.largest('y'):.1e}, "
        f"gradients {training.largest('dx', 'dresidual', 'dweight', 'dbias'):.1e}, "
        f"running statistics {training.largest('running_mean', 'running_var'):.1e}",
    )
    steps = len(training.loss["ours"])
    if training.ratio <= 1:
        console.print(
            f"[bold green]agree[/]: in all {steps} steps, "
            f"the worst error is {training.ratio:.0%} of what float32 may lose"
        )
        return 0
    wrong = [
        f"{name} of {layer} ({layout})"
        for (layer, layout), row in training.worst.items()
        for name, difference in row.items()
        if not difference.ours <= 1
    ]
    console.print(
        f"[bold red]DISAGREE[/]: up to {training.ratio:.3g} times what float32 may lose, in "
        + ", ".join(wrong),
    )
    return 1


def _print(console: Any, training: Training) -> None:
    from rich import box
    from rich.table import Table

    def table(title: str, *headers: str) -> Table:
        empty = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for header in headers:
            empty.add_column(header, justify="right" if header in right else "left", no_wrap=True)
        return empty

    right = {"first", "last", *_HEADERS.values()}
    curves = table(
        f"training, {training.seconds:.0f} s", "", "loss", "first", "last", "test accuracy, %"
    )
    for name, losses in training.loss.items():
        accuracy = " ".join(f"{100 * a:.1f}" for a in training.accuracy[name])
        ends = (f"{losses[0]:.4f}", f"{losses[-1]:.4f}")
        curves.add_row(NAMES[name], sparkline(losses, 24), *ends, accuracy)
    console.print(curves)
    drift = max(abs(a - b) for a, b in zip(*training.loss.values(), strict=True))
    console.print(f"the two losses drift apart by {drift:.1e} at most\n")

    judged = table(
        "worst error in lock-step, in % of what float32 may lose",
        "layer",
        "layout",
        *_HEADERS.values(),
    )
    for (layer, layout), row in sorted(training.worst.items()):
        judged.add_row(layer, layout, *(_cell(row.get(name)) for name in _HEADERS))
    console.print(judged)
    theirs = max(d.theirs for row in training.worst.values() for d in row.values())
    console.print(f"torch's own, by the same measure: {theirs:.0%} at worst\n")

    console.print("plans")
    for (layer, layout), plans in sorted(training.plans.items()):
        console.print(f"  {layer} {layout}")
        console.print(f"    forward   {plans.forward}")
        console.print(f"    backward  {plans.backward}")
    console.print()


def _cell(difference: Difference | None) -> str:
    if difference is None:
        return ""
    text = f"{100 * difference.ours:.0f}" if difference.ours < 10 else ">999"
    return text if difference.ours <= 1 else f"[bold red]{text}[/]"


def sparkline(values: list[float], width: int) -> str:
    """Values as a line of at most ``width`` blocks, each the mean of its share of them."""
    width = min(width, len(values))
    edges = [len(values) * i // width for i in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = 7 / (high - low) if high > low else 0.0
    return "".join("▁▂▃▄▅▆▇█"[round((m - low) * scale)] for m in means)
