"""The pictures of what was measured, from the rows in a results folder: ``python -m perf plots``.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; in print, markers do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from perf.cases import OPS
from perf.providers import COPY

__all__ = ["PLOTS", "draw", "draw_all", "geometric_mean", "load"]

#: Colour and marker by provider; whoever is not named is grey.
STYLE = {
    "triton_bn": ("#0072B2", "o"),
    "triton_bn resident": ("#56B4E9", "<"),
    "triton_bn split": ("#56B4E9", ">"),
    "triton_bn streamed": ("#56B4E9", "d"),
    "torch eager": ("#777777", "s"),
    "torch native": ("#555555", "s"),
    "torch cuDNN": ("#999999", "D"),
    "torch.compile": ("#E69F00", "^"),
    "flag_gems": ("#CC79A7", "v"),
    "attorch": ("#D55E00", "P"),
    "apex": ("#009E73", "X"),
    "inplace_abn": ("#8C7A00", "*"),
    COPY: ("#000000", ""),
}
EAGER = ("torch native", "torch cuDNN")
OTHER = ("#AAAAAA", ".")
BLUES = LinearSegmentedColormap.from_list("blues", ["#08519C", "#6BAED6", "#EFF3FF"])

plt.rcParams.update(
    {
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
        "figure.dpi": 150,
        "figure.constrained_layout.use": True,
    }
)


class NoData(Exception):
    """Nothing was measured that the picture could show."""


def load(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What the code last measured here has measured, and the rows of searches.

    Rows that did not pass the gate are not measured; those of older code cannot stand beside newer.
    """
    path = folder / "bench.json"
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = pd.DataFrame(data.get("rows", []))
    if not rows.empty:
        code = rows[["gpu", "torch", "triton", "fingerprint"]]
        latest = code.loc[rows["time"].idxmax()]
        rows = rows[(code == latest).all(axis=1) & (rows["status"] == "measured")].copy()
        rows["batch"] = rows["shape"].str.split("x").str[0].astype(int)
        rows["layer"] = rows["shape"].str.split("x").str[1:].map("×".join)
    return rows, pd.DataFrame(data.get("search", []))


def geometric_mean(values: pd.Series) -> float:
    return float(np.exp(np.log(values.astype(float)).mean()))


def _pick(rows: pd.DataFrame, **wanted: Any) -> pd.DataFrame:
    """The rows with these values: NoData for none."""
    for name, value in wanted.items():
        rows = rows[rows[name].isin(value) if isinstance(value, tuple) else rows[name] == value]
    if rows.empty:
        raise NoData
    return rows


def _fullest(rows: pd.DataFrame, name: str) -> Any:
    """The value of a column with the most layers measured; the larger of two that are even."""
    counts = rows.groupby(name)["layer"].nunique()
    return max(counts.index, key=lambda value: (counts[value], value))


def _layers(rows: pd.DataFrame) -> list[str]:
    """The layers, the largest first."""
    size = {layer: np.prod([int(n) for n in layer.split("×")]) for layer in rows["layer"].unique()}
    return sorted(size, key=lambda layer: (-size[layer], layer))


def _finish(figure: Figure, title: str, source: str, named: Sequence[Axes] = ()) -> Figure:
    """Title and source; between title and pictures, a legend of the providers on ``named`` axes."""
    figure.suptitle(title + ("\n" if named else ""), x=0.01, ha="left", weight="bold", size=11)
    figure.supxlabel(source, x=0.01, ha="left", size=7, color="#555555")
    known: dict[str, Any] = {}
    for axis in named:
        known |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    order = sorted(known, key=lambda name: [*STYLE, name].index(name))
    if order:
        below = 1 - 0.22 / figure.get_figheight()
        figure.legend(
            [known[name] for name in order], order, loc="upper left", bbox_to_anchor=(0, below),
            ncols=len(order), frameon=False, columnspacing=1.2, handletextpad=0.4,
        )  # fmt: skip
    return figure


def _source(rows: pd.DataFrame) -> str:
    last = rows.sort_values("time").iloc[-1]
    return (
        f"{last['gpu']}, torch {last['torch']}, Triton {last['triton']}; medians, caches cold, "
        f"all providers in one run; measured {last['time'][:10]}"
    )


def bandwidth(rows: pd.DataFrame, search: pd.DataFrame) -> Figure:
    """How near to the roofline each provider comes, layer by layer."""
    rows = _pick(rows, network="ResNet-50", op="bn", measure=("forward", "backward"))
    rows = _pick(rows, dtype=_fullest(rows, "dtype"))
    rows = _pick(rows, batch=_fullest(rows, "batch"))
    rows = _pick(rows[rows["provider"] != COPY].dropna(subset=["share_of_copy"]))
    panels = [
        (layout, measure, rows[(rows["layout"] == layout) & (rows["measure"] == measure)])
        for layout in ("contiguous", "channels_last")
        for measure in ("forward", "backward")
    ]
    panels = [panel for panel in panels if not panel[2].empty]
    layers = _layers(rows)
    columns = min(len(panels), 2)
    figure, axes = plt.subplots(
        -(-len(panels) // columns), columns, sharex=True, sharey=True, squeeze=False,
        figsize=(9, 1.3 + 0.27 * (len(layers) + 2) * -(-len(panels) // columns)),
    )  # fmt: skip
    for axis, (layout, measure, part) in zip(axes.flat, panels, strict=False):
        for provider, own in part.groupby("provider"):
            colour, marker = STYLE.get(provider, OTHER)
            front = provider == "triton_bn"
            places = [layers.index(layer) for layer in own["layer"]]
            axis.scatter(
                own["share_of_copy"], places, s=42 if front else 24, color=colour, marker=marker,
                label=provider, zorder=3 + front, linewidths=0,
            )  # fmt: skip
        axis.axvline(1, color="black", linewidth=1.2)
        axis.set_title(f"{measure}, {layout}")
        axis.set_yticks(range(len(layers)), layers)
        axis.set_ylim(len(layers) - 0.5, -0.5)
        axis.set_xlim(0, max(1.08, 1.03 * rows["share_of_copy"].max()))
        axis.grid(axis="y", color="#E5E5E5", linewidth=0.6)
        axis.xaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1))
        axis.tick_params(left=False)
    axes[0, 0].annotate(
        "a copy of the\nsame bytes", (1, 1), xycoords=("data", "axes fraction"), xytext=(-4, 3),
        textcoords="offset points", ha="right", va="bottom", size=7,
    )  # fmt: skip
    for axis in axes[-1]:
        axis.set_xlabel("share of the copy's bandwidth")
    first = rows.iloc[0]
    title = f"Bandwidth: ResNet-50's batch norms, batch {first['batch']}, {first['dtype']}"
    return _finish(figure, title, _source(rows), [*axes.flat])


def speedup(rows: pd.DataFrame, search: pd.DataFrame) -> Figure:
    """How many times as long torch takes for both directions, by what is fused."""
    rows = _pick(rows, network="ResNet-50", measure="forward+backward", layout="channels_last")
    rows = _pick(rows, dtype=_fullest(rows, "dtype"))
    rows = _pick(rows, batch=_fullest(rows, "batch"))
    times = rows.pivot_table(index=["op", "layer"], columns="provider", values="ms")
    times = times.reindex(columns=["triton_bn", *EAGER, "torch.compile"])
    ratios = pd.DataFrame(
        {
            "torch eager": times[list(EAGER)].min(axis=1) / times["triton_bn"],
            "torch.compile": times["torch.compile"] / times["triton_bn"],
        }
    ).dropna(how="all")
    ops = [op for op in OPS if op in ratios.index.get_level_values(0)]
    if not ops:
        raise NoData
    layers = _layers(ratios.reset_index())
    places = np.arange(len(layers) + 1)
    figure, axes = plt.subplots(
        1, len(ops), sharex=True, sharey=True, squeeze=False,
        figsize=(3 * len(ops) + 1.5, 1.5 + 0.34 * len(places)),
    )  # fmt: skip
    for axis, op in zip(axes[0], ops, strict=True):
        for name, offset in (("torch eager", -0.2), ("torch.compile", 0.2)):
            values = ratios.loc[op][name].reindex(layers)
            values = [*values, geometric_mean(values.dropna())]
            bars = axis.barh(places + offset, values, 0.36, color=STYLE[name][0], label=name)
            axis.bar_label(bars, [f"{v:.2f}" if v == v else "" for v in values], padding=2, size=7)
        axis.axvline(1, color=STYLE["triton_bn"][0], linewidth=1.5, label="triton_bn")
        axis.axhline(len(layers) - 0.5, color="#BBBBBB", linewidth=0.8)
        axis.set_yticks(places, [*layers, "geometric mean"])
        axis.set_ylim(len(layers) + 0.5, -0.6)
        axis.set_xlim(0, 1.12 * ratios.max().max())
        axis.set_title(op.replace("+", " → "))
        axis.tick_params(left=False)
        axis.set_xlabel("time / triton_bn's time")
    first = rows.iloc[0]
    what = f"batch {first['batch']}, {first['dtype']}, channels_last"
    title = f"Forward + backward of ResNet-50's batch norms, {what}"
    return _finish(
        figure, title, _source(rows) + "; eager: the faster of native and cuDNN", [*axes.flat]
    )


def scaling(rows: pd.DataFrame, search: pd.DataFrame) -> Figure:
    """What a batch norm costs as the batch grows."""
    rows = _pick(rows, network="ResNet-50", op="bn", measure=("forward", "backward"))
    rows = _pick(rows, dtype=_fullest(rows, "dtype"))
    batches = rows.groupby("layer")["batch"].nunique()
    if batches.max() < 3:
        raise NoData
    layer = batches.idxmax()
    rows = _pick(rows, layer=layer)
    rows = rows[~rows["provider"].str.startswith("triton_bn ")]
    panels = [
        (layout, measure, part)
        for (layout, measure), part in rows.groupby(["layout", "measure"])
        if part["batch"].nunique() > 2
    ]
    panels.sort(key=lambda panel: (panel[0] != "contiguous", panel[1] != "forward"))
    lines = -(-len(panels) // 2)
    figure, axes = plt.subplots(
        lines, 2, sharex=True, sharey=True, squeeze=False, figsize=(9, 1 + 2.8 * lines)
    )
    for axis, (layout, measure, part) in zip(axes.flat, panels, strict=False):
        for provider, own in part.sort_values("batch").groupby("provider"):
            colour, marker = STYLE.get(provider, OTHER)
            dash = "--" if provider == COPY else "-"
            middle, low, high = (1e3 * own[name] for name in ("ms", "p20_ms", "p80_ms"))
            axis.plot(own["batch"], middle, dash, marker=marker, color=colour, ms=4, lw=1.3)
            axis.fill_between(own["batch"], low, high, color=colour, alpha=0.2, linewidth=0)
        _label_ends(axis, part, 0.05 * math.log10(rows["ms"].max() / rows["ms"].min()))
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(sorted(rows["batch"].unique()))
        for ticks in (axis.xaxis, axis.yaxis):
            ticks.set_major_formatter("{x:g}")
        axis.set_title(f"{measure}, {layout}")
        axis.grid(color="#E5E5E5", linewidth=0.6)
    for axis in axes[-1]:
        axis.set_xlabel("batch")
    for axis in axes[:, 0]:
        axis.set_ylabel("µs")
    title = f"Cost by batch: {layer} (C×H×W), {rows.iloc[0]['dtype']}"
    return _finish(figure, title, _source(rows) + "; bands: 20th to 80th percentile")


def _label_ends(axis: Axes, part: pd.DataFrame, gap: float) -> None:
    """Names the lines at their last points, from the bottom up, ``gap`` decades apart at least."""
    last = part.sort_values("batch").groupby("provider").tail(1).sort_values("ms")
    place = -math.inf
    for _, row in last.iterrows():
        place = max(math.log10(1e3 * row["ms"]), place + gap)
        axis.annotate(
            row["provider"], (row["batch"], 10**place), xytext=(6, 0), textcoords="offset points",
            va="center", size=7.5, color=STYLE.get(row["provider"], OTHER)[0],
        )  # fmt: skip


def landscape(rows: pd.DataFrame, search: pd.DataFrame) -> Figure:
    """Every plan that a search timed for a problem, by tile and warps."""
    if search.empty:
        raise NoData
    search = _cells(search.rename(columns=lambda name: name.removeprefix("transform_")))
    timed = search[search["status"].isin(["timed", "remembered"])]
    counts = timed.groupby("problem").size()
    if counts.empty or counts.max() < 2:
        raise NoData
    problems = [
        counts[counts.index.str.startswith(direction)].idxmax()
        for direction in ("forward", "backward")
        if counts.index.str.startswith(direction).any()
    ]
    tables = []
    for problem in problems:
        table = search[search["problem"] == problem].sort_values("median_ms")
        shade = table["median_ms"] / table["median_ms"].min()
        tables.append(table.assign(shade=shade, text=table.apply(_timing, axis=1)))
    figure = _heat_maps(tables, problems, "time / best time")
    source = (
        f"{search.iloc[0]['device']}; medians in µs, caches cold; each cell has the best of its "
    )
    source += "plans, with its tile; *: stopped early; failed: did not run"
    return _finish(figure, "Tuning: every plan timed", source)


def _timing(row: pd.Series) -> str:
    if pd.isna(row["median_ms"]):
        return "failed" if str(row["status"]).startswith("failed") else ""
    return f"{1e3 * row['median_ms']:.1f}" + (" *" if row["status"] == "stopped early" else "")


def compile_facts(facts: pd.DataFrame) -> Figure:
    """Registers of every plan as compiled, by tile and warps; spilling ones are marked."""
    tile = pd.DataFrame([*facts["tile"]], index=facts.index)
    facts = _cells(facts.join(tile[["rows", "columns", "depth"]]))
    spills = facts["spilled"] > 0
    text = facts.apply(lambda row: f"{row['registers']} ({row['occupancy']:.0%})", axis=1)
    facts = facts.assign(shade=facts["registers"].mask(spills), text=text.mask(spills, "spills"))
    facts = facts.sort_values("shade")
    target = facts["target"].iloc[0]
    groups = facts[facts["target"] == target].groupby(["problem", "kernel"])
    # Forward before backward, and moments before what follows them.
    order = sorted(groups.groups, key=lambda group: (group[0].startswith("backward"), group))
    names = [f"{kernel}: {problem}" for problem, kernel in order]
    figure = _heat_maps([groups.get_group(group) for group in order], names, "registers a thread")
    source = "from python -m triton_bn inspect; each cell has the plan of the fewest registers"
    title = f"Compile facts for {target}, not timings: registers a thread (occupancy)"
    return _finish(figure, title, source)


def _cells(rows: pd.DataFrame) -> pd.DataFrame:
    """With ``cell``, the row of a map that a plan is in, and the ``tile`` to write there."""

    def cell(row: pd.Series) -> str:
        if row["driver"] == "resident":
            return f"resident, {int(row['columns'])} wide"
        return f"{row['driver']}, depth {int(row['depth'])}"

    tiles = [
        f"{int(rows)}×{int(columns)}"
        for rows, columns in zip(rows["rows"], rows["columns"], strict=True)
    ]
    return rows.assign(cell=rows.apply(cell, axis=1), tile=tiles)


def _heat_maps(tables: Sequence[pd.DataFrame], titles: Sequence[str], label: str) -> Figure:
    """A map a table: tiles × warps. A cell shows its first row, by its ``text`` and ``shade``."""
    tables = [table.drop_duplicates(["cell", "warps"]) for table in tables]
    heights = [table["cell"].nunique() for table in tables]
    figure, axes = plt.subplots(
        len(tables), 1, squeeze=False, height_ratios=heights,
        figsize=(7, 1.2 + 0.34 * sum(heights) + 0.6 * len(tables)),
    )  # fmt: skip
    shades = pd.concat([table["shade"] for table in tables])
    low, high = shades.min(), shades.max()
    for axis, table, title in zip(axes[:, 0], tables, titles, strict=True):
        names, warps = sorted(table["cell"].unique(), key=_by_number), sorted(set(table["warps"]))
        grid = np.full((len(names), len(warps)), np.nan)
        for _, row in table.iterrows():
            y, x = names.index(row["cell"]), warps.index(row["warps"])
            grid[y, x] = row["shade"]
            if row["text"] in ("failed", "spills"):
                axis.add_patch(
                    Rectangle((x - 0.5, y - 0.5), 1, 1, hatch="////", ec="#CCCCCC", fill=0, lw=0)
                )
            middle = {"ha": "center", "va": "center"}
            middle["color"] = "white" if row["shade"] < low + 0.4 * (high - low) else "black"
            axis.text(x, y - 0.12, row["text"], size=8, **middle)
            axis.text(x, y + 0.25, row["tile"], size=6, **middle)
        axis.set_facecolor("#F7F7F7")
        image = axis.imshow(grid, cmap=BLUES, vmin=low, vmax=high, aspect="auto")
        axis.set_xticks(range(len(warps)), [f"{int(n)} warps" for n in warps])
        axis.set_yticks(range(len(names)), names)
        axis.set_title(title, size=9)
        axis.tick_params(left=False, bottom=False)
        axis.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes[:, 0].tolist(), label=label, shrink=0.6, pad=0.02)
    return figure


def _by_number(cell: str) -> tuple[str, int]:
    name, number = cell.split(", ")
    return name, int("".join(filter(str.isdigit, number)))


#: The pictures by file name, of a folder's measured rows and its searches.
PLOTS: dict[str, Callable[[pd.DataFrame, pd.DataFrame], Figure]] = {
    "bandwidth": bandwidth,
    "speedup": speedup,
    "scaling": scaling,
    "landscape": landscape,
}


def draw(folder: Path) -> list[Path]:
    """Draws what a folder has data for: the files written."""
    rows, search = load(folder)
    figures: list[tuple[str, Callable[[], Figure]]] = []
    if not rows.empty or not search.empty:
        figures += [(name, partial(plot, rows, search)) for name, plot in PLOTS.items()]
    if (folder / "inspect.json").exists():
        facts = pd.DataFrame(json.loads((folder / "inspect.json").read_text(encoding="utf-8")))
        figures.append(("compile", partial(compile_facts, facts)))
    written = []
    for name, figure in figures:
        try:
            picture = figure()
        except NoData:
            continue
        path = folder / f"{name}.png"
        picture.savefig(path, metadata={"Software": None})
        plt.close(picture)
        written.append(path)
    return written


def draw_all(results: Path) -> int:
    """Draws every folder under ``results``; 1 where there is nothing to draw."""
    written = [path for folder in [results, *sorted(results.glob("*/"))] for path in draw(folder)]
    for path in written:
        print(path)
    if not written:
        print(f"nothing to draw: no GPU was measured yet (no bench.json under {results})")
    return int(not written)
