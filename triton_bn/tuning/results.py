"""What a search finds, and how it is shown: timings, the table of candidates, the progress bar."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

from triton_bn.plan import Device, Plan, Tile, heuristic
from triton_bn.problem import Problem

__all__ = ["Report", "Result", "Row", "Timing", "progress_bar"]


@dataclass(frozen=True)
class Timing:
    """Milliseconds: the median, and the 20th and 80th percentiles."""

    median: float
    p20: float
    p80: float
    runs: int
    stopped: bool = False

    @classmethod
    def of(cls, times: list[float], stopped: bool = False) -> Timing:
        fifths = statistics.quantiles(times, n=5, method="inclusive")
        return cls(statistics.median(times), fifths[0], fifths[3], len(times), stopped)


@dataclass(frozen=True)
class Row:
    """A candidate, and what came of it.

    ``status`` is ``"timed"``, ``"stopped early"`` (hopeless after a few runs), ``"failed: ..."``,
    ``"dominated"`` (not timed: the compiler says that another is better), ``"wrong result: ..."``,
    ``"not checked: ..."`` (there was no memory to look at its results), ``"not reached"`` (the budget, or
    Ctrl-C), or ``"remembered"`` from an earlier search.
    """

    plan: Plan
    status: str
    timing: Timing | None = None


@dataclass(frozen=True)
class Result:
    """The table of a search, the fastest first; ``complete`` if every candidate had its turn."""

    problem: Problem
    device: Device
    rows: tuple[Row, ...]
    complete: bool

    @property
    def best(self) -> Row | None:
        """The fastest row, or ``None`` where nothing could be timed."""
        return next((row for row in self.rows if row.status in ("timed", "remembered")), None)

    @property
    def gain(self) -> float | None:
        """The heuristic's time over the best time, where both were timed."""
        untuned = heuristic(self.problem, self.device)
        times = [row.timing for row in self.rows if row.plan == untuned and row.timing is not None]
        best = self.best
        if best is None or best.timing is None or not times or best.status == "remembered":
            return None
        return times[0].median / best.timing.median

    def as_rows(self) -> list[dict[str, Any]]:
        """Flat rows for pandas or JSON: problem, device, plan, times in ms, status."""
        problem, untuned, best = self.problem, heuristic(self.problem, self.device), self.best
        shared = {
            "problem": str(problem),
            "device": self.device.name,
            "direction": problem.direction,
            "outer": problem.outer,
            "channels": problem.channels,
            "inner": problem.inner,
            "dtype": str(problem.dtype).removeprefix("torch."),
            "training": problem.training,
            "activation": problem.activation and str(problem.activation),
            "residual": problem.residual,
        }
        return [
            {
                **shared,
                **_flat(row.plan),
                "median_ms": row.timing and row.timing.median,
                "p20_ms": row.timing and row.timing.p20,
                "p80_ms": row.timing and row.timing.p80,
                "runs": row.timing and row.timing.runs,
                "status": row.status,
                "heuristic": row.plan == untuned,
                "best": row is best,
            }
            for row in self.rows
        ]

    def __str__(self) -> str:
        lines = [f"{self.problem} on {self.device.name}{'' if self.complete else ' (incomplete)'}"]
        lines.append(f"  {'median ms':>10} {'p20':>10} {'p80':>10}  plan")
        for row in self.rows:
            note = "" if row.status == "timed" else f"  [{row.status}]"
            lines.append(f"  {_times(row.timing)}  {_name(row.plan)}{note}")
        return "\n".join(lines)

    def summary(self) -> str:
        """One line: the problem, its best time, the gain over the heuristic, and the plan."""
        best = self.best
        if best is None or best.timing is None:
            return f"{'-':>10}  {'':>6}  {self.problem}: nothing timed"
        gain = "" if self.gain is None else f"{self.gain:.2f}x"
        incomplete = "" if self.complete else " (incomplete)"
        return (
            f"{best.timing.median:10.4f}  {gain:>6}  {self.problem}: {_name(best.plan)}{incomplete}"
        )


def _name(plan: Plan) -> str:
    """A plan in words; only one that is not just a candidate is marked by its source."""
    return str(plan).removesuffix(" (candidate)")


def _flat(plan: Plan) -> dict[str, Any]:
    """A plan on one level: ``transform_rows`` and so on, ``None`` for a tile it has not."""
    flat: dict[str, Any] = {}
    for name, value in plan.as_dict().items():
        if name in ("transform", "reduce"):
            flat |= {f"{name}_{f.name}": value and value[f.name] for f in fields(Tile)}
        elif name == "channels":  # of a resident program: the problem has channels too
            flat["program_channels"] = value
        else:
            flat[name] = value
    return flat


def _times(timing: Timing | None) -> str:
    if timing is None:
        return " ".join(["-".rjust(10)] * 3)
    return f"{timing.median:10.4f} {timing.p20:10.4f} {timing.p80:10.4f}"


class Report(tuple[Result, ...]):
    """The results of several searches; prints as their tables."""

    def __str__(self) -> str:
        return "\n\n".join(map(str, self))

    def summary(self) -> str:
        """One line a problem, under a heading."""
        heading = f"{'best ms':>10}  {'gain':>6}  problem: plan"
        return "\n".join([heading, *(result.summary() for result in self)])

    def as_rows(self) -> list[dict[str, Any]]:
        """:meth:`Result.as_rows` of all."""
        return [row for result in self for row in result.as_rows()]


@contextmanager
def progress_bar(title: str, total: int, shown: bool) -> Iterator[Callable[[float], None]]:
    """Yields what to call after each candidate with the best milliseconds so far (or ``inf``).

    With rich it is a bar on stderr, without rich a line there at the end.
    """
    bar = _rich_bar() if shown else None
    task = bar.add_task(title, total=total, best="") if bar else None
    found = ""

    def advance(best: float) -> None:
        nonlocal found
        found = "" if best == math.inf else f"best {best:.4f} ms"
        if bar:
            bar.update(task, advance=1, best=found)

    try:
        yield advance
    finally:
        if bar:
            bar.stop()
        elif shown:
            print(f"tuned {title}: {found or 'nothing timed'}", file=sys.stderr)


def _rich_bar() -> Any:
    """A started bar; ``None`` without rich, or where the caller shows a bar of its own."""
    try:
        from rich.console import Console
        from rich.errors import LiveError
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    except ImportError:
        return None
    name, best = TextColumn("{task.description}", markup=False), TextColumn("{task.fields[best]}")
    bar = Progress(name, BarColumn(), MofNCompleteColumn(), best, console=Console(stderr=True))
    try:
        bar.start()
    except LiveError:
        return None
    return bar
