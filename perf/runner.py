"""The loop: for each case, all providers pass the gate, are timed in turn, and leave a row each."""

from __future__ import annotations

import csv
import gc
import hashlib
import io
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Executor, wait
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import triton_bn
from perf.cases import Case
from perf.clocks import Call, Clock, clock_for
from perf.providers import COPY, PROVIDERS, Provider, available
from perf.subjects import Subject, network, subjects_of

__all__ = ["COLUMNS", "Lab", "Results", "Row", "compile_ahead", "measure", "run_cases"]

#: A row's columns, in the order of the CSV; ``perf/README.md`` says what each means.
COLUMNS = (
    "question", "network", "layers", "shape", "layout", "dtype", "op", "measure", "provider", "status",
    "detail", "ms", "p20_ms", "p80_ms", "n", "bytes", "gb_per_s", "share_of_copy", "peak_bytes",
    "kept_bytes", "plan", "gpu", "torch", "cuda", "triton", "triton_bn", "provider_version",
    "fingerprint", "time",
)  # fmt: skip
#: Those of a case; the fingerprint and versions say whether a row is still good for it.
SETTING = ("question", "shape", "layout", "dtype", "op")

#: Files and folders that no measurement depends on: a change of anything else calls for new ones.
WITHOUT_EFFECT = {
    "triton_bn": ("commands", "demo", "inspection", "oracle.py", "tuning/results.py", "version.py"),
    "perf": (
        "commands", "__main__.py", "ab.py", "cases.py", "idle.py", "plots.py", "pytest_visit.py", "search.py",
        "shapes.py", "summary.py", "visit.py", "wait.py",
    ),
}  # fmt: skip

Row = dict[str, Any]


@dataclass
class Lab:
    """Where cases are measured, by whom and by which clocks: what a test replaces."""

    device: torch.device
    providers: Sequence[Provider] = PROVIDERS
    clock: Callable[[str, torch.device], Clock] = clock_for
    networks: Callable[[str], nn.Module] = network
    now: Callable[[], float] = time.monotonic
    #: Seconds for the rounds of one measure of a case; the rounds that are too few, and enough.
    seconds: float = 0.3
    fewest: int = 10
    most: int = 100

    def __post_init__(self) -> None:
        self.versions = available(self.providers)
        self.providers = [p for p in self.providers if p.name in self.versions]
        self.about = about(self.device)


def about(device: torch.device) -> Row:
    """What every row says of machine and code: rows that agree in it can stand side by side."""
    import triton

    digest = hashlib.sha256(json.dumps([*available(PROVIDERS).items()]).encode())
    for folder in (Path(triton_bn.__file__).parent, Path(__file__).parent):
        without = [folder / name for name in WITHOUT_EFFECT[folder.name]]
        for path in sorted(folder.rglob("*.py")):
            if not {path, *path.parents} & {*without}:
                digest.update(path.name.encode() + path.read_bytes())
    on_gpu = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if on_gpu else platform.processor() or "CPU",
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda or torch.version.hip or "",
        "triton": str(triton.__version__),
        "triton_bn": triton_bn.__version__,
        "fingerprint": digest.hexdigest()[:16],
    }


# ---- One case ------------------------------------------------------------------------------------


def measure(case: Case, lab: Lab) -> list[Row]:
    """The rows of a case: one for each measure and provider that takes it."""
    subjects = subjects_of(case, lab.providers, lab.device, lab.networks)
    rows = []
    for name in case.measures:
        calls = [s.calls[name] for s in subjects if s.status == "measured" and name in s.calls]
        times = _rounds(calls, lab.clock(name, lab.device), lab) if calls else {}
        floor = statistics.median(times[COPY]) if COPY in times else None
        for subject in subjects:
            if subject.provider != COPY or COPY in times:
                rows.append(_row(case, name, subject, lab, times.get(subject.provider), floor))
    return rows


def _rounds(calls: list[Call], clock: Clock, lab: Lab) -> dict[str, list[float]]:
    """Milliseconds by provider. The order turns: nobody always follows the same neighbour."""
    times: dict[str, list[float]] = {call.provider: [] for call in calls}
    for _ in range(2):
        clock.round(calls)
    end = lab.now() + lab.seconds
    for n in range(lab.most):
        if n >= lab.fewest and lab.now() >= end:
            break
        turned = calls[n % len(calls) :] + calls[: n % len(calls)]
        for call, ms in zip(turned, clock.round(turned), strict=True):
            times[call.provider].append(ms)
    return times


def _row(
    case: Case,
    name: str,
    subject: Subject,
    lab: Lab,
    times: list[float] | None = None,
    floor: float | None = None,
) -> Row:
    row: Row = dict.fromkeys(COLUMNS)
    row |= zip(SETTING, case.key, strict=True)
    row |= {
        "network": case.network,
        "layers": case.layers,
        "measure": name,
        "provider": subject.provider,
        "status": subject.status,
        "detail": subject.detail,
        "plan": subject.plan,
        "bytes": case.bytes(name) or None,
        "provider_version": lab.versions.get(subject.provider, ""),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **lab.about,
        **subject.facts,
    }
    if times:
        ms, fifths = statistics.median(times), statistics.quantiles(times, n=5, method="inclusive")
        row |= {"ms": ms, "p20_ms": fifths[0], "p80_ms": fifths[3], "n": len(times)}
        row["gb_per_s"] = case.bytes(name) / ms / 1e6 or None
        row["share_of_copy"] = floor and floor / ms
    return row


# ---- All cases -----------------------------------------------------------------------------------


class Results:
    """The rows of one GPU in a folder: ``bench.json``, and ``bench.csv`` with the same rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "bench.json"
        data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.rows: list[Row] = data.get("rows", [])
        #: The tables of searches, as ``triton_bn.tuning.results.Result.as_rows`` has them.
        self.search: list[Row] = data.get("search", [])
        #: How long programs wait for one another (:mod:`perf.wait`).
        self.waits: list[Row] = data.get("waits", [])

    def has(self, case: Case, lab: Lab) -> bool:
        """Whether the case was measured: by this very code and its peers, on this GPU and torch."""
        return set(case.measures) <= {
            row["measure"]
            for row in self.rows
            if all(row[name] == value for name, value in lab.about.items())
            and tuple(row[name] for name in SETTING) == case.key
        }

    def add(self, rows: Sequence[Row]) -> None:
        """Stores rows, in place of all older ones of their case and measure."""

        def place(row: Row) -> tuple[Any, ...]:
            return tuple(row[name] for name in (*SETTING, "measure"))

        replaced = {place(row) for row in rows}
        self.rows = [row for row in self.rows if place(row) not in replaced] + list(rows)
        self.save()

    def add_wait(self, row: Row) -> None:
        place = ("gang", "a_processor", "gpu")
        others = [old for old in self.waits if any(old[name] != row[name] for name in place)]
        self.waits = [*others, row]
        self.save()

    def save(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        table = io.StringIO()
        writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        text = json.dumps({"rows": self.rows, "search": self.search, "waits": self.waits}, indent=0)
        for name, content in (("bench.json", text), ("bench.csv", table.getvalue())):
            # Whoever reads meanwhile, or comes after a crash, finds the old file or the new one.
            beside = self.folder / f"{name}.part"
            beside.write_text(content, encoding="utf-8")
            os.replace(beside, self.folder / name)


def run_cases(
    cases: Sequence[Case],
    results: Results,
    lab: Lab,
    *,
    again: bool = False,
    budget: float = math.inf,
    ahead: Callable[[Sequence[Case]], None] = lambda cases: None,
    window: int = 12,
    say: Callable[[str], None] = print,
) -> int:
    """Measures cases in their order until the budget (seconds) is spent: so many.

    Those known are left out, unless ``again``.

    ``ahead`` is given a window of cases before they are measured, to compile what they need.

    Raises:
        torch.AcceleratorError: when a case broke the GPU's context. All before it is stored, and
            its row says so: the next run goes on behind it.
    """
    deadline, measured = lab.now() + budget, 0
    todo = [case for case in cases if again or not results.has(case, lab)]
    say(f"{len(todo)} cases to measure, {len(cases) - len(todo)} known")
    for index, case in enumerate(todo):
        if lab.now() >= deadline:
            say(f"the budget is spent; {len(todo) - index} cases left (run again to go on)")
            break
        if index % window == 0:
            ahead(todo[index : index + window])
        broken = None
        try:
            rows = measure(case, lab)
        except Exception as error:  # out of memory, say: the next case may be smaller
            subject = Subject("all", "error", f"{type(error).__name__}: {error}"[:200])
            rows = [_row(case, name, subject, lab) for name in case.measures]
            broken = error if isinstance(error, torch.AcceleratorError) else None
        gc.collect()
        results.add(rows)
        measured += 1
        say(f"{index + 1}/{len(todo)} {case}: {_headline(rows)}")
        if broken is not None:
            raise broken
    return measured


#: Seconds for a window of cases to be compiled; what is not by then is compiled as it is measured.
COMPILE = 90.0


def compile_ahead(cases: Sequence[Case], pool: Executor, limit: float = COMPILE) -> None:
    """Runs every provider once, in other processes: what they compile is in the caches then.

    Not a whole network's: it is as much work as all other cases together, and nobody waits for it.
    """
    with suppress(BrokenExecutor):  # a process crashed; what it met, the measurement meets
        futures = [pool.submit(_compile, case) for case in cases if case.op != "model"]
        wait(futures, limit)
        for future in futures:
            future.cancel()


def _compile(case: Case) -> None:
    import torch._inductor.config as inductor

    inductor.compile_threads = 1  # the processes are many already
    gpu = torch.device("cuda")
    subjects_of(case, Lab(gpu).providers, gpu, network, judged=False)
    gc.collect()
    torch.cuda.empty_cache()


def _headline(rows: Sequence[Row]) -> str:
    parts = []
    for row in rows:
        if row["provider"] in ("triton_bn", "all"):
            text = f"{row['ms']:.4f} ms" if row["ms"] else row["status"]
            if row["share_of_copy"]:
                text += f" ({row['share_of_copy']:.0%} of the copy)"
            parts.append(f"{row['measure']} {text}")
    return ", ".join(parts)
