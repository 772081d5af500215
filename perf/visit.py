"""A visit to a GPU that is there for ten minutes: ``make gpu``, or ``python -m perf visit``.

Tests on compiled kernels, the telling cases of the benchmark, the A/B comparisons, a search, the step of
a whole network, in this order, each a process with a time limit of its own. One that fails or is stopped
costs no other its results; what each found is in the results folder as soon as it is there, and copied to
``--output`` while it runs. A later visit goes on where this one ended, as long as the sources are the same;
``--part`` names what it is for.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from perf.commands.arguments import RESULTS

__all__ = ["FILES", "PARTS", "Outcome", "Stage", "add_arguments", "perform", "run", "stages"]

ROOT = Path(__file__).parent.parent

#: What a visit leaves behind, and copies to ``--output``. Pictures are drawn from it anywhere.
FILES = ("visit.md", "visit.log", "tests.json", "bench.json", "bench.csv", "plans.json")

#: Seconds for a stage to end by itself when it is asked to: pytest sums up.
PATIENCE = 8.0

#: The exit code of a command after which nothing works on the GPU until another process takes over.
BROKEN = 3


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


def stages(folder: Path) -> tuple[Stage, ...]:
    """All stages of a visit whose results are in ``folder``, the GPU's within the results' folder."""

    def tests(limit: int) -> list[str]:
        options = [
            "-p", "perf.pytest_visit", "--visit", str(folder / "tests.json"),
            "--visit-seconds", str(0.9 * limit), "-m", "not dist and not models",
            "--continue-on-collection-errors", "-q", "--tb=no", "--no-header", "-rN",
            "-p", "no:cacheprovider", "-o", "faulthandler_timeout=120",
            # What another release of torch or NumPy deprecates is not what a visit is for.
            *(f"-Wdefault::{name}" for name in ("DeprecationWarning", "PendingDeprecationWarning", "FutureWarning")),
        ]  # fmt: skip
        if find_spec("xdist"):
            # One test at a time, so that the most telling are the first.
            options += ["-n", str(os.cpu_count() or 1), "--dist", "load", "--maxschedchunk", "1"]
        return [sys.executable, "-m", "pytest", *options, "tests"]

    def perf(*command: str) -> Callable[[int], list[str]]:
        # A command stops by itself before it would be stopped.
        return lambda limit: [
            sys.executable, "-m", "perf", *command, "--results", str(folder.parent),
            "--budget", str(int(0.85 * limit)),
        ]  # fmt: skip

    return (
        Stage("tests", tests, 0.35),
        Stage("bench", perf("run"), 0.45),
        Stage("ab", perf("ab"), 0.4),
        Stage("search", perf("search"), 0.4),
        Stage("step", perf("run", "--only", "model"), 1.0),
    )


PARTS = tuple(stage.name for stage in stages(RESULTS))


def perform(
    plan: Sequence[Stage],
    seconds: float,
    now: Callable[[], float] = time.monotonic,
    said: Callable[[str], None] = lambda line: print(line, flush=True),
    meanwhile: Callable[[], None] = lambda: None,
) -> Iterator[Outcome]:
    """Runs the stages one after the other, within ``seconds`` together.

    A command that broke the GPU's context is run again by a new process in the time it has left. Every
    line of output goes to ``said`` when it is printed; ``meanwhile`` is called every few seconds.
    """
    deadline = now() + seconds
    for stage in plan:
        limit = int(min(stage.share * (deadline - now()), deadline - now() - PATIENCE))
        begin = now()
        if limit < 1:
            yield Outcome(stage.name, "no time left", 0.0, "")
            continue
        said(f"== {stage.name} (at most {limit} s)")
        lines: list[str] = []

        def line(text: str, lines: list[str] = lines) -> None:
            lines.append(text)
            said(text)

        result = f"exit code {BROKEN}"
        while result == f"exit code {BROKEN}" and (left := int(begin + limit - now())) >= 1:
            result = _run(stage.command(left), left, line, meanwhile)
        outcome = Outcome(stage.name, result, now() - begin, "\n".join(lines[-30:]).strip())
        said(f"-- {stage.name}: {result} after {outcome.seconds:.0f} s")
        yield outcome


def _run(
    command: list[str], limit: int, said: Callable[[str], None], meanwhile: Callable[[], None]
) -> str:
    """The result of a command; it and all its children end at its limit."""
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        errors="replace", start_new_session=True, env=environment,
    )  # fmt: skip

    def read() -> None:
        assert process.stdout is not None
        for text in process.stdout:
            if text.strip():
                said(text.rstrip())

    reader = threading.Thread(target=read, daemon=True)
    reader.start()

    def ended(seconds: float) -> bool:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            with suppress(subprocess.TimeoutExpired):
                process.wait(min(2.0, max(end - time.monotonic(), 0.01)))
                return True
            meanwhile()
        return False

    result = "stopped at its limit"
    if ended(limit):
        result = "done" if process.returncode == 0 else f"exit code {process.returncode}"
    else:  # asked first, so that pytest sums up
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        ended(PATIENCE)
    with suppress(ProcessLookupError, PermissionError):  # its children too
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    reader.join(2.0)
    if not reader.is_alive() and process.stdout is not None:
        process.stdout.close()
    meanwhile()
    return result


def report(title: str, outcomes: Sequence[Outcome], sections: Sequence[str]) -> str:
    """The page that a visit leaves behind."""
    lines = [f"# {title}", "", "| stage | result | seconds |", "| --- | --- | --- |"]
    lines += [f"| {o.name} | {o.result} | {o.seconds:.0f} |" for o in outcomes]
    for section in filter(None, sections):
        lines += ["", section]
    for outcome in outcomes:
        lines += ["", f"## {outcome.name}", "", "```", outcome.tail, "```"]
    return "\n".join(lines) + "\n"


def tested(folder: Path) -> str:
    """How many tests passed by now with the sources as they are, and which failed."""
    from perf.pytest_visit import fingerprint, read

    mark = fingerprint()
    last = {row["test"]: row for row in read(folder / "tests.json") if row["fingerprint"] == mark}
    if not last:
        return ""
    failed = [row for row in last.values() if row["outcome"] == "failed"]
    passed = sum(row["outcome"] == "passed" for row in last.values())
    lines = [f"{passed} tests passed on compiled kernels, {len(failed)} failed."]
    for row in failed:
        reasons = [line for line in row["detail"].splitlines() if line.startswith("E ")]
        lines.append(f"- `{row['test']}`: {(reasons or ['']).pop(0)[:300]}")
    return "\n".join(lines)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--part", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART",
        help=f"what this visit is for: {', '.join(PARTS)} (default: all, in this order)",
    )  # fmt: skip
    parser.add_argument(
        "--seconds", type=float, default=540.0, help="for everything together (default: 540)"
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"(default: {RESULTS})")
    parser.add_argument(
        "--output", type=Path, default=os.environ.get("OUT"),
        help="a folder to copy the results to (default: the environment's OUT)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 when every stage was done, 1 when one was not."""
    import torch

    from triton_bn.plan import Device
    from triton_bn.tuning import cache

    name = Device.current(torch.device("cuda", torch.cuda.current_device())).name
    return visit(args, name, args.results / cache.slug(name))


def visit(args: argparse.Namespace, name: str, folder: Path) -> int:
    """:func:`run` on the GPU of that name, with its folder of results."""
    import torch

    begin = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    title = (
        f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC"
    )
    log = (folder / "visit.log").open("a", encoding="utf-8")
    log.write(f"==== {title}: {' '.join(args.part)}\n")

    def said(line: str) -> None:
        print(line, flush=True)
        log.write(f"{time.monotonic() - begin:6.1f} {line}\n")
        log.flush()

    outcomes: list[Outcome] = []
    chosen = [stage for stage in stages(folder) if stage.name in args.part]
    # A visit for one part gives it all the time.
    chosen[-1] = Stage(chosen[-1].name, chosen[-1].command, 1.0)
    copy = lambda: _copy(folder, args.output)  # noqa: E731
    for outcome in perform(chosen, args.seconds, said=said, meanwhile=copy):
        outcomes.append(outcome)
        sections = [tested(folder), _tables(folder)]
        (folder / "visit.md").write_text(report(title, outcomes, sections), encoding="utf-8")
        copy()
    said(f"{title}: results in {folder}")
    for outcome in outcomes:
        said(f"  {outcome.name:10} {outcome.result} ({outcome.seconds:.0f} s)")
    for section in filter(None, (tested(folder), _tables(folder))):
        said(section)
    log.close()
    copy()
    return int(any(outcome.result != "done" for outcome in outcomes))


def _tables(folder: Path) -> str:
    """What was measured, beside the targets."""
    from perf.plots import load
    from perf.summary import tables

    try:
        return tables(load(folder))
    except Exception as error:  # a page without it is better than none
        return f"no tables: {type(error).__name__}: {error}"


def _copy(folder: Path, output: Path | str | None) -> None:
    """Copies what has changed to the folder that is handed on."""
    if output is None:
        return
    output = Path(output)
    output.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        found, there = folder / name, output / name
        if found.exists() and (
            not there.exists() or found.stat().st_mtime_ns > there.stat().st_mtime_ns
        ):
            shutil.copy2(found, there)
