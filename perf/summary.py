"""The targets beside what was measured, from a folder of results: ``python -m perf summary``."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from perf.plots import EAGER, geometric_mean, load
from perf.providers import COPY

__all__ = ["Target", "show_all", "table", "targets"]


class Target(NamedTuple):
    """``measured`` is ``None`` where nothing was; ``most``: whether the bound is an upper one."""

    what: str
    bound: float
    most: bool
    measured: float | None
    cases: int

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.bound if self.most else self.measured >= self.bound


def _times(rows: pd.DataFrame, measure: str, **wanted: str) -> pd.DataFrame:
    """Medians in ms: a line a case, a column a provider, torch's faster as "eager"; our plan."""
    rows = rows[rows["measure"] == measure]
    for name, value in wanted.items():
        rows = rows[rows[name] == value]
    setting = ["shape", "layout", "dtype", "op"]
    times = rows.pivot_table(index=setting, columns="provider", values="ms")
    times = times.reindex(
        columns=sorted({*times.columns, "triton_bn", COPY, "torch.compile", *EAGER})
    )
    times["eager"] = times[list(EAGER)].min(axis=1)
    times["fastest"] = times[["eager", "torch.compile"]].min(axis=1)
    times["plan"] = rows[rows["provider"] == "triton_bn"].set_index(setting)["plan"]
    return times


def targets(rows: pd.DataFrame) -> list[Target]:
    """Every target with what was measured for it."""
    found: list[Target] = []

    def add(
        what: str, bound: float, most: bool, ratios: pd.Series, over: Callable[[pd.Series], float]
    ) -> None:
        ratios = ratios.dropna()
        found.append(Target(what, bound, most, over(ratios) if len(ratios) else None, len(ratios)))

    resnet = rows[
        (rows["network"] == "ResNet-50")
        & rows["dtype"].isin(["bfloat16", "float16"])
        & rows["batch"].between(32, 256)
    ]
    for measure in ("forward", "backward"):
        times = _times(resnet, measure, op="bn")
        ratio = times["triton_bn"] / times[COPY]
        resident = times["plan"].str.contains(f"{measure} resident", na=False).astype(bool)
        add(f"{measure} / copy, resident, worst shape", 1.15, True, ratio[resident], max)
        add(f"{measure} / copy, ResNet-50, geometric mean", 1.25, True, ratio, geometric_mean)
    times = _times(resnet, "forward+backward", op="bn")
    gain = times["fastest"] / times["triton_bn"]
    add("torch (eager or compiled, the faster) / ours, worst shape", 1.0, False, gain, min)
    add(
        "torch (eager or compiled, the faster) / ours, geometric mean",
        1.3,
        False,
        gain,
        geometric_mean,
    )
    times = _times(resnet, "forward+backward", op="bn+add+relu")
    for name, bound in (("torch.compile", 1.3), ("eager", 3.0)):
        ratio = times[name] / times["triton_bn"]
        add(f"BN+add+ReLU, {name} / ours, geometric mean", bound, False, ratio, geometric_mean)
    steps = rows[rows["measure"] == "step"].pivot_table(
        index="shape", columns="provider", values="ms"
    )
    for theirs, own, bound in (
        ("torch", "triton_bn", 1.25),
        ("torch.compile", "triton_bn + compile", 1.0),
    ):
        both = steps.reindex(columns=[theirs, own])
        add(
            f"ResNet-50 step, {theirs} / {own}",
            bound,
            False,
            both[theirs] / both[own],
            geometric_mean,
        )
    times = _times(rows, "host")
    add(
        "host time / torch eager's, small tensor",
        1.0,
        True,
        times["triton_bn"] / times["eager"],
        max,
    )
    for op, bound in (("bn+relu", 1.0), ("bn+add+relu", 1.07)):
        own = rows[
            (rows["measure"] == "memory") & (rows["provider"] == "triton_bn") & (rows["op"] == op)
        ]
        size = own["shape"].map(lambda shape: math.prod(map(int, shape.split("x")))) * own[
            "dtype"
        ].map(_bytes)
        kept = (own["kept_bytes"] / size).astype(float)
        add(f"kept for backward in tensors, {op}", bound, True, kept.round(2), max)
    return found


def _bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


def table(rows: pd.DataFrame) -> str:
    """The targets as a table in Markdown; a target without a measurement has an empty cell."""
    lines = ["| what | target | measured | met | cases |", "| --- | --- | --- | --- | --- |"]
    for target in targets(rows):
        sign, value = "≤" if target.most else "≥", target.measured
        met = {None: "", True: "yes", False: "no"}[target.met]
        text = "" if value is None else f"{value:.2f}"
        lines.append(
            f"| {target.what} | {sign} {target.bound:.2f} | {text} | {met} | {target.cases or ''} |"
        )
    return "\n".join(lines)


def show_all(results: Path) -> int:
    """Prints the table of every GPU under ``results``; 1 where there is none."""
    shown = 0
    for folder in [results, *sorted(results.glob("*/"))]:
        rows, _ = load(folder)
        if not rows.empty:
            print(f"{rows.iloc[-1]['gpu']}\n{table(rows)}")
            shown += 1
    if not shown:
        print(f"nothing was measured yet (no bench.json under {results})")
    return int(not shown)
