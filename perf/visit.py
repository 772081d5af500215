"""A whole visit to a GPU in under ten minutes: ``python -m perf visit``, or ``make gpu``.

Tests on compiled kernels, tests that need a GPU, a search of the telling plans, the benchmark, the
plots, and the targets beside what was measured, printed last. Each stage is a process with a time
limit of its own; one that fails or is stopped costs no other stage its results.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from perf.commands.arguments import RESULTS
from triton_bn.plan import Device
from triton_bn.tuning import cache

__all__ = ["FILES", "Outcome", "Stage", "add_arguments", "perform", "run"]

ROOT = Path(__file__).parent.parent

#: What a visit leaves behind, and copies to ``--output``.
FILES = (
    "visit.md", "bench.csv", "bench.json", "plans.json",
    "bandwidth.png", "speedup.png", "scaling.png", "landscape.png",
)  # fmt: skip


#: Seconds for a stage to end by itself when it is asked to.
PATIENCE = 5.0


@dataclass(frozen=True)
class Stage:
    """A command, which gets ``share`` of the time that is left when it starts, in whole seconds."""

    name: str
    command: Callable[[int], list[str]]
    share: float


@dataclass(frozen=True)
class Outcome:
    name: str
    result: str
    seconds: float
    tail: str


def stages(results: Path) -> tuple[Stage, ...]:
    def pytest(marked: str) -> list[str]:
        options = ["-q", "--no-header", "-n", str(min(os.cpu_count() or 1, 8)), "-m", marked]
        return [sys.executable, "-m", "pytest", *options, "tests"]

    def perf(command: str, seconds: int) -> list[str]:
        # A command stops by itself before it would be stopped.
        budget = ["--budget", str(int(0.85 * seconds))] if command in ("run", "search") else []
        return [sys.executable, "-m", "perf", command, "--results", str(results), *budget]

    return (
        Stage("tests", lambda _: pytest("not gpu and not dist and not models"), 0.2),
        Stage("gpu tests", lambda _: pytest("gpu and not dist and not models"), 0.12),
        Stage("search", lambda seconds: perf("search", seconds), 0.2),
        Stage("benchmark", lambda seconds: perf("run", seconds), 0.9),
        Stage("plots", lambda _: perf("plots", 0), 0.9),
    )


def perform(
    plan: Sequence[Stage], seconds: float, now: Callable[[], float] = time.monotonic
) -> Iterator[Outcome]:
    """Runs the stages one after the other, within ``seconds`` together."""
    deadline = now() + seconds
    for stage in plan:
        limit = int(stage.share * (deadline - now()))
        print(f"== {stage.name} (at most {limit} s)", flush=True)
        begin = now()
        result, output = _run(stage.command(limit), limit)
        yield Outcome(
            stage.name, result, now() - begin, "\n".join(output.strip().splitlines()[-30:])
        )


def _run(command: list[str], limit: int) -> tuple[str, str]:
    """The result and the output of a command; it and all its children end at its limit."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=max(limit, 1))
        return "done" if process.returncode == 0 else f"exit code {process.returncode}", output
    except subprocess.TimeoutExpired:
        pass
    for number in (signal.SIGINT, signal.SIGKILL):  # asked first, so that pytest sums up
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, number)
            output, _ = process.communicate(timeout=PATIENCE)
            return "stopped at its limit", output
    return "could not be stopped", ""


def report(title: str, outcomes: Sequence[Outcome], table: str) -> str:
    """The page that a visit leaves behind."""
    lines = [f"# {title}", "", "| stage | result | seconds |", "| --- | --- | --- |"]
    lines += [f"| {o.name} | {o.result} | {o.seconds:.0f} |" for o in outcomes]
    lines += ["", table]
    for outcome in outcomes:
        lines += ["", f"## {outcome.name}", "", "```", outcome.tail, "```"]
    return "\n".join(lines) + "\n"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--seconds", type=float, default=570.0, help="for everything together (default: 570)"
    )
    parser.add_argument(
        "--output", type=Path, help="a folder to copy the results to, after every stage"
    )


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 when every stage was done, 1 when one was not."""
    from perf.plots import load
    from perf.summary import table

    device = Device.current(torch.device("cuda", torch.cuda.current_device()))
    folder = RESULTS / cache.slug(device.name)
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{device.name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d', time.gmtime())}"
    outcomes: list[Outcome] = []
    for outcome in perform(stages(RESULTS), args.seconds):
        outcomes.append(outcome)
        print(
            f"{outcome.tail}\n-- {outcome.name}: {outcome.result} after {outcome.seconds:.0f} s",
            flush=True,
        )
        rows, _ = load(folder)
        targets = "Nothing was measured." if rows.empty else table(rows)
        (folder / "visit.md").write_text(report(title, outcomes, targets), encoding="utf-8")
        if args.output is not None:
            args.output.mkdir(parents=True, exist_ok=True)
            for name in FILES:
                if (folder / name).exists():
                    shutil.copy2(folder / name, args.output / name)
    print(f"\n{title}: results in {folder}")
    for outcome in outcomes:
        print(f"  {outcome.name:10} {outcome.result} ({outcome.seconds:.0f} s)")
    print(targets)
    return int(any(outcome.result != "done" for outcome in outcomes))
