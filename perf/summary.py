"""The targets beside what was measured, from a folder of results: ``python -m perf summary``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from perf.plots import EAGER, Data, geometric_mean, input_bytes, load
from perf.providers import COPY

__all__ = ["Target", "show_all", "table", "tables", "targets"]


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
        1.5,
        False,
        gain,
        geometric_mean,
    )
    times = _times(resnet, "forward+backward", op="bn+add+relu")
    for name, bound in (("torch.compile", 1.5), ("eager", 3.0)):
        ratio = times[name] / times["triton_bn"]
        add(f"BN+add+ReLU, {name} / ours, geometric mean", bound, False, ratio, geometric_mean)
    for measure, theirs, own, bound in (
        ("step", "torch", "triton_bn", 1.25),
        ("compiled step", "torch.compile", "triton_bn + compile", 1.0),
    ):
        both = _times(rows, measure).reindex(columns=[theirs, own])
        ratio = both[theirs] / both[own]
        add(f"ResNet-50 step, {theirs} / {own}", bound, False, ratio, geometric_mean)
    times = _times(rows, "host")
    add(
        "host time / torch eager's, small tensor",
        1.3,
        True,
        times["triton_bn"] / times["eager"],
        max,
    )
    for op, bound in (("bn+relu", 1.0), ("bn+add+relu", 2.0)):
        own = rows[
            (rows["measure"] == "memory") & (rows["provider"] == "triton_bn") & (rows["op"] == op)
        ]
        kept = pd.Series([row["kept_bytes"] / input_bytes(row) for _, row in own.iterrows()])
        add(f"kept for backward in tensors, {op}", bound, True, kept.astype(float).round(2), max)
    return found


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


def tables(data: Data) -> str:
    """The targets, then what A/B comparisons and the measurement of waits found, in Markdown."""
    parts = [] if data.rows.empty else [table(data.rows)]
    for question, rows in data.ab.groupby("question", sort=False):
        lines = [
            f"**{question}**",
            "",
            "| case | choice | ms | p20 | p80 | plan |",
            "|" + " --- |" * 6,
        ]
        for _, row in rows.iterrows():
            case = f"{row['shape']} {row['layout']} {row['op']} {row['measure']}"
            times = " | ".join(f"{row[name]:.4f}" for name in ("ms", "p20_ms", "p80_ms"))
            lines.append(f"| {case} | {row['provider']} | {times} | {row['plan'] or ''} |")
        parts.append("\n".join(lines))
    if not data.waits.empty:
        lines = ["| programs that wait | a processor | µs | least | most |", "|" + " --- |" * 5]
        for _, row in data.waits.iterrows():
            lines.append(
                f"| {row['gang']} | {row['a_processor']} | {row['us']:.2f} | {row['least_us']:.2f} "
                f"| {row['most_us']:.2f} |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def show_all(results: Path) -> int:
    """Prints the tables of every GPU under ``results``; 1 where there is none."""
    shown = 0
    for folder in [results, *sorted(results.glob("*/"))]:
        data = load(folder)
        if text := tables(data):
            named = data.waits if data.rows.empty else data.rows
            print(f"{named.iloc[-1]['gpu']}\n{text}")
            shown += 1
    if not shown:
        print(f"nothing was measured yet (no bench.json under {results})")
    return int(not shown)
