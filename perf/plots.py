"""The pictures of what was measured, from the rows in a results folder: ``python -m perf plots``.

Colours are Okabe and Ito's, which colour-blind readers can tell apart; in print, markers do.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from perf.runner import COLUMNS

__all__ = ["PLOTS", "Data", "draw", "draw_all", "geometric_mean", "input_bytes", "load"]

#: Colour and marker by provider; whoever is not named is grey.
STYLE = {
    "triton_bn": ("#0072B2", "o"),
    "triton_bn resident": ("#56B4E9", "<"),
    "triton_bn split": ("#56B4E9", ">"),
    "triton_bn streamed": ("#56B4E9", "d"),
    "triton_bn + compile": ("#0072B2", "p"),
    "torch": ("#777777", "s"),
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
#: Colour by what is done with a whole network.
WAYS = {
    "stock": "#777777",
    "converted": "#56B4E9",
    "recompute": "#0072B2",
    "torch.utils.checkpoint": "#E69F00",
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


#: How a heat map frames the plans that are asked for, by the column that says which they are.
FRAMES: dict[str, dict[str, Any]] = {
    "best": {"fill": False, "ec": "#D55E00", "lw": 2.2, "zorder": 4},
    "heuristic": {"fill": False, "ec": "black", "lw": 1.4, "ls": "--", "zorder": 8},
}
SHORT = {"contiguous": "NCHW", "channels_last": "NHWC"}


class NoData(Exception):
    """Nothing was measured that the picture could show."""


@dataclass(frozen=True)
class Data:
    """What the code that last measured here has measured.

    ``rows`` are the benchmark's, ``ab`` those of A/B comparisons, ``search`` every plan that a search
    timed, ``waits`` how long programs wait for one another.
    """

    rows: pd.DataFrame
    ab: pd.DataFrame
    search: pd.DataFrame
    waits: pd.DataFrame


def load(folder: Path) -> Data:
    """The data of a folder.

    Rows that did not pass the gate are not measured; those of older code cannot stand beside newer.
    """
    path = folder / "bench.json"
    data = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    rows = pd.DataFrame(data.get("rows", []), columns=COLUMNS)
    if not rows.empty:
        code = rows[["gpu", "torch", "triton", "fingerprint"]]
        latest = code.loc[rows["time"].idxmax()]
        rows = rows[(code == latest).all(axis=1) & (rows["status"] == "measured")].copy()
    rows["batch"] = rows["shape"].str.split("x").str[0].astype(int)
    rows["layer"] = rows["shape"].str.split("x").str[1:].str.join("×")
    waits = pd.DataFrame(data.get("waits", []))
    if not waits.empty:
        waits = waits[waits["status"] == "measured"]
    bench = rows["question"] == ""
    return Data(rows[bench], rows[~bench], pd.DataFrame(data.get("search", [])), waits)


def input_bytes(row: pd.Series) -> int:
    """The size of a row's input."""
    values = math.prod(map(int, row["shape"].split("x")))
    return values * (4 if row["dtype"] == "float32" else 2)


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
    """Title and source; to the right a legend of what is named on the ``named`` axes."""
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=11)
    figure.supxlabel(source, x=0.01, ha="left", size=7, color="#555555")
    known: dict[str, Any] = {}
    for axis in named:
        known |= dict(zip(*axis.get_legend_handles_labels()[::-1], strict=True))
    order = sorted(known, key=lambda name: [*STYLE, name].index(name))
    if order:
        figure.legend(
            [known[name] for name in order], order, loc="outside right upper", frameon=False,
            handletextpad=0.4, labelspacing=0.7,
        )  # fmt: skip
    return figure


def _grid(panels: int, width: float, height: float, **options: Any) -> tuple[Figure, Any]:
    """Axes for so many panels, two beside one another; those of no panel are not drawn."""
    columns = min(panels, 2)
    lines = -(-panels // columns)
    figure, axes = plt.subplots(
        lines,
        columns,
        squeeze=False,
        figsize=(width * columns + 1.6, 1 + height * lines),
        **options,
    )
    for axis in axes.flat[panels:]:
        axis.set_visible(False)
    return figure, axes


def _panels(rows: pd.DataFrame, fewest: int, along: str) -> list[tuple[str, str, pd.DataFrame]]:
    """(layout, measure, rows) wherever enough different values ``along`` a column were measured."""
    found = [
        (layout, measure, part)
        for (layout, measure), part in rows.groupby(["layout", "measure"])
        if part[along].nunique() >= fewest
    ]
    if not found:
        raise NoData
    return sorted(found, key=lambda panel: (panel[0] != "contiguous", panel[1] != "forward"))


def _line(axis: Axes, provider: str, x: pd.Series, y: pd.Series) -> None:
    colour, marker = STYLE.get(provider, OTHER)
    axis.plot(
        x, y, "--" if provider == COPY else "-", marker=marker, color=colour, ms=4, lw=1.3,
        label=provider, zorder=3 + (provider == "triton_bn"),
    )  # fmt: skip


def _source(rows: pd.DataFrame) -> str:
    last = rows.sort_values("time").iloc[-1]
    return (
        f"{last['gpu']}, torch {last['torch']}, Triton {last['triton']}; medians, caches cold, "
        f"all providers in one run; measured {last['time'][:10]}"
    )


def bandwidth(data: Data) -> Figure:
    """How near to the roofline each provider comes, layer by layer."""
    rows = _pick(data.rows, network="ResNet-50", op="bn", measure=("forward", "backward"))
    rows = _pick(rows, dtype=_fullest(rows, "dtype"))
    rows = _pick(rows, batch=_fullest(rows, "batch"))
    rows = _pick(rows[rows["provider"] != COPY].dropna(subset=["share_of_copy"]))
    panels, layers = _panels(rows, 1, "layer"), _layers(rows)
    figure, axes = _grid(len(panels), 3.8, 0.27 * (len(layers) + 2), sharex=True, sharey=True)
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


def speedup(data: Data) -> Figure:
    """How many times as long torch takes for both directions, by what is fused."""
    rows = _pick(data.rows, network="ResNet-50", measure="forward+backward", layout="channels_last")
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


def scaling(data: Data) -> Figure:
    """What a batch norm costs as the batch grows."""
    rows = _pick(data.rows, network="ResNet-50", op="bn", measure=("forward", "backward"))
    rows = _pick(rows, dtype=_fullest(rows, "dtype"))
    batches = rows.groupby("layer")["batch"].nunique()
    layer = batches.idxmax()
    rows = _pick(rows, layer=layer)
    rows = rows[~rows["provider"].str.startswith("triton_bn ")]
    panels = _panels(rows, 3, "batch")
    figure, axes = _grid(len(panels), 3.8, 2.8, sharex=True, sharey=True)
    for axis, (layout, measure, part) in zip(axes.flat, panels, strict=False):
        for provider, own in part.sort_values("batch").groupby("provider"):
            middle, low, high = (1e3 * own[name] for name in ("ms", "p20_ms", "p80_ms"))
            _line(axis, provider, own["batch"], middle)
            colour = STYLE.get(provider, OTHER)[0]
            axis.fill_between(own["batch"], low, high, color=colour, alpha=0.2, linewidth=0)
        axis.set_yscale("log")
        _powers(axis, rows["batch"])
        axis.yaxis.set_major_formatter("{x:g}")
        axis.set_title(f"{measure}, {layout}")
    for axis in axes[-1]:
        axis.set_xlabel("batch")
    for axis in axes[:, 0]:
        axis.set_ylabel("µs")
    title = f"Cost by batch: {layer} (C×H×W), {rows.iloc[0]['dtype']}"
    source = _source(rows) + "; bands: 20th to 80th percentile"
    return _finish(figure, title, source, [*axes.flat])


def _powers(axis: Axes, values: pd.Series) -> None:
    """A logarithmic axis of x that names the values themselves."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(values.unique()))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.grid(color="#E5E5E5", linewidth=0.6)


def channels(data: Data) -> Figure:
    """How much of the bandwidth is left when there are few channels, or many."""
    rows = _pick(data.rows, op="bn", measure=("forward", "backward"))
    rows = rows[~rows["provider"].str.startswith("triton_bn ")]
    sizes = rows["shape"].str.split("x")
    rows = rows.assign(
        channels=sizes.str[1].astype(int),
        others=sizes.str[0] + " × C × " + sizes.str[2:].str.join("×"),
    ).dropna(subset=["gb_per_s"])
    counts = rows.groupby(["others", "dtype"])["channels"].nunique()
    if counts.empty:
        raise NoData
    others, dtype = counts.idxmax()
    rows = _pick(rows, others=others, dtype=dtype)
    panels = _panels(rows, 4, "channels")
    figure, axes = _grid(len(panels), 3.8, 2.6, sharex=True, sharey=True)
    for axis, (layout, measure, part) in zip(axes.flat, panels, strict=False):
        for provider, own in part.sort_values("channels").groupby("provider"):
            _line(axis, provider, own["channels"], own["gb_per_s"])
        _powers(axis, rows["channels"])
        axis.set_ylim(0)
        axis.set_title(f"{measure}, {layout}")
    for axis in axes[-1]:
        axis.set_xlabel("channels C")
    for axis in axes[:, 0]:
        axis.set_ylabel("GB/s")
    title = f"Bandwidth by channels: {others}, {dtype}"
    return _finish(figure, title, _source(rows), [*axes.flat])


def size(data: Data) -> Figure:
    """Bandwidth against the bytes that must move, all shapes of all networks."""
    rows = _pick(data.rows, op="bn", measure=("forward", "backward"))
    rows = rows[~rows["provider"].str.startswith("triton_bn ")].dropna(subset=["gb_per_s"])
    panels = _panels(rows, 4, "bytes")
    figure, axes = _grid(len(panels), 3.8, 2.8, sharex=True, sharey=True)
    for axis, (layout, measure, part) in zip(axes.flat, panels, strict=False):
        for provider, own in part.groupby("provider"):
            colour, marker = STYLE.get(provider, OTHER)
            front = provider == "triton_bn"
            axis.scatter(
                own["bytes"] / 1e6, own["gb_per_s"], s=16 if front else 10, color=colour,
                marker=marker or "_", label=provider, zorder=3 + front,
            )  # fmt: skip
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_ylim(0)
        axis.grid(color="#E5E5E5", linewidth=0.6)
        axis.set_title(f"{measure}, {layout}")
    for axis in axes[-1]:
        axis.set_xlabel("MB read and written at least")
    for axis in axes[:, 0]:
        axis.set_ylabel("GB/s")
    return _finish(figure, "Bandwidth by size, all shapes", _source(rows), [*axes.flat])


def _bars(
    data: Data, measure: str, value: Callable[[pd.DataFrame], pd.Series], text: str
) -> tuple[Figure, pd.DataFrame, Any]:
    """A panel for each op with a bar for each provider."""
    rows = _pick(data.rows, measure=measure)
    rows = rows.assign(value=value(rows).astype(float)).dropna(subset=["value"])
    for name in ("shape", "layout"):
        rows = _pick(rows, **{name: _fullest(rows.assign(layer=rows["op"]), name)})
    ops = [op for op in (*OPS, "model") if op in set(rows["op"])]
    names = sorted(rows["provider"].unique(), key=lambda name: [*STYLE, name].index(name))
    figure, axes = plt.subplots(
        1, len(ops), sharex=True, sharey=True, squeeze=False,
        figsize=(2.3 * len(ops) + 1.9, 1.2 + 0.3 * len(names)),
    )  # fmt: skip
    for axis, op in zip(axes[0], ops, strict=True):
        own = rows[rows["op"] == op].set_index("provider")["value"].reindex(names)
        colours = [STYLE.get(name, OTHER)[0] for name in names]
        bars = axis.barh(range(len(names)), own, 0.7, color=colours)
        axis.bar_label(bars, [text.format(v) if v == v else "" for v in own], padding=2, size=7)
        for place in np.flatnonzero(own.isna()):
            axis.text(0.02 * rows["value"].max(), place, "not measured", size=7, va="center")
        axis.set_yticks(range(len(names)), names)
        axis.set_ylim(len(names) - 0.4, -0.6)
        axis.set_xlim(0, 1.25 * rows["value"].max())
        axis.set_title(op.replace("+", " → "))
        axis.tick_params(left=False)
    return figure, rows, axes


def memory(data: Data) -> Figure:
    """What forward keeps for backward, in tensors of the input's size."""

    def tensors(rows: pd.DataFrame) -> pd.Series:
        return rows["kept_bytes"] / rows.apply(input_bytes, axis=1)

    figure, rows, axes = _bars(data, "memory", tensors, "{:.2f}")
    axes[0, 0].set_xlabel("tensors of the input's size, the input included")
    first = rows.iloc[0]
    title = f"Kept from forward for backward: {first['shape'].replace('x', '×')}, {first['dtype']}"
    return _finish(figure, title, _source(rows).replace("medians, caches cold, ", ""))


def host(data: Data) -> Figure:
    """What a call costs the host, forward and backward."""
    figure, rows, axes = _bars(data, "host", lambda rows: 1e3 * rows["ms"], "{:.0f}")
    axes[0, 0].set_xlabel("µs of the host, forward + backward")
    title = f"The host's time, {rows.iloc[0]['shape'].replace('x', '×')}"
    return _finish(figure, title, _source(rows).replace(", caches cold", ""))


def step(data: Data) -> Figure:
    """A training step of a whole network."""
    rows = _pick(data.rows, measure=("step", "compiled step")).dropna(subset=["ms"])
    # Torch's eager step stands beside both; each ratio is of one run.
    shown = [
        (f"{provider}\n({measure})", STYLE.get(provider, OTHER)[0], ms, batch / ms * 1e3)
        for measure in ("step", "compiled step")
        for provider, ms, batch in rows[rows["measure"] == measure][
            ["provider", "ms", "batch"]
        ].itertuples(index=False)
        if measure == "step" or provider != "torch"
    ]
    names, colours, times, images = zip(*shown, strict=True)
    figure, axis = plt.subplots(figsize=(7, 1.2 + 0.5 * len(shown)))
    bars = axis.barh(range(len(shown)), times, 0.7, color=colours)
    labels = [f"{t:.1f} ms, {n:.0f} images/s" for t, n in zip(times, images, strict=True)]
    axis.bar_label(bars, labels, padding=3, size=8)
    axis.set_yticks(range(len(shown)), names)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.35 * max(times))
    axis.set_xlabel("ms a step")
    axis.tick_params(left=False)
    first = rows.iloc[0]
    what = f"batch {first['batch']}, {first['dtype']} autocast, {first['layout']}"
    return _finish(figure, f"A training step of {first['network']}, {what}", _source(rows))


def comparisons(data: Data) -> Figure:
    """Every A/B comparison: the time under each choice as a multiple of the first one's."""
    rows = _pick(data.ab, measure=("forward", "backward"))
    rows = rows[rows["provider"] != COPY].dropna(subset=["ms"])
    names = [*dict.fromkeys(rows["question"])]
    if not names:
        raise NoData
    parts = [_relative(rows[rows["question"] == name]) for name in names]
    figure, axes = plt.subplots(
        len(parts), 1, squeeze=False, height_ratios=[len(part) + 2 for part in parts],
        figsize=(9, 1 + 0.22 * sum(len(part) + 4 for part in parts)),
    )  # fmt: skip
    palette = ("#000000", "#0072B2", "#E69F00", "#009E73")
    for axis, part, name in zip(axes[:, 0], parts, names, strict=True):
        for number, choice in enumerate(part.columns):
            axis.scatter(
                part[choice], range(len(part)), s=24, color=palette[number % 4],
                marker="|osD"[number % 4], label=choice, zorder=3,
            )  # fmt: skip
        axis.axvline(1, color="#BBBBBB", linewidth=0.8)
        axis.set_yticks(range(len(part)), part.index, size=7)
        axis.set_ylim(len(part) - 0.5, -0.5)
        axis.grid(color="#E5E5E5", linewidth=0.6)
        axis.set_title(f"{name}: time / that of “{part.columns[0]}”")
        axis.tick_params(left=False)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    return _finish(figure, "A/B comparisons, the lower the better", _source(rows))


def _relative(rows: pd.DataFrame) -> pd.DataFrame:
    """Times as multiples of the first provider's: a line a case and measure, a column a provider."""
    rows = rows.assign(
        case=rows["shape"].str.replace("x", "×") + " " + rows["layout"].map(SHORT)
        + " " + rows["op"] + " " + rows["measure"]
    )  # fmt: skip
    order = [*dict.fromkeys(rows["provider"])]
    times = rows.pivot_table(index="case", columns="provider", values="ms", sort=False)
    times = times.reindex(columns=order)
    return times.div(times[order[0]], axis=0)


def waits(data: Data) -> Figure:
    """How long programs of one launch wait for one another."""
    if data.waits.empty:
        raise NoData
    figure, axis = plt.subplots(figsize=(6, 3.2))
    for number, (a_processor, own) in enumerate(data.waits.groupby("a_processor")):
        own = own.sort_values("gang")
        colour = ("#0072B2", "#E69F00", "#009E73")[number % 3]
        axis.plot(
            own["gang"], own["us"], marker="os^"[number % 3], color=colour, ms=4,
            label=f"{a_processor} a processor",
        )  # fmt: skip
        axis.fill_between(
            own["gang"], own["least_us"], own["most_us"], color=colour, alpha=0.2, linewidth=0
        )
    _powers(axis, data.waits["gang"])
    axis.set_ylim(0)
    axis.set_xlabel("programs that wait for one another")
    axis.set_ylabel("µs from publishing to having read")
    axis.legend(frameon=False)
    last = data.waits.iloc[-1]
    source = f"{last['gpu']}, torch {last['torch']}, Triton {last['triton']}; bands: least to most"
    return _finish(figure, "How long programs of a launch wait for one another", source)


def tuned(data: Data) -> Figure:
    """What tuning bought: the heuristic's time over the best plan's, problem by problem."""
    if data.search.empty:
        raise NoData
    timed = data.search[data.search["status"] == "timed"].dropna(subset=["median_ms"])
    best = timed.groupby("problem")["median_ms"].min()
    usual = timed[timed["heuristic"].astype(bool)].groupby("problem")["median_ms"].min()
    facts = timed.drop_duplicates("problem").set_index("problem")
    gains = (usual / best).dropna().sort_values(ascending=False)
    if gains.empty:
        raise NoData
    facts = facts.loc[gains.index]
    panels = [way for way in ("forward", "backward") if (facts["direction"] == way).any()]
    most = max((facts["direction"] == way).sum() for way in panels)
    figure, axes = plt.subplots(
        1, len(panels), sharex=True, squeeze=False,
        figsize=(4.5 * len(panels), 1.3 + 0.22 * most),
    )  # fmt: skip
    for axis, way in zip(axes[0], panels, strict=True):
        own = gains[facts["direction"] == way]
        # "forward training 256x256x3136 bfloat16": rows, channels, values a channel and row.
        names = [problem.removeprefix(f"{way} training ") for problem in own.index]
        bars = axis.barh(range(len(own)), own - 1, 0.7, left=1, color=STYLE["triton_bn"][0])
        axis.bar_label(bars, [f"{gain:.2f}" for gain in own], padding=2, size=7)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_yticks(range(len(own)), names, size=7)
        axis.set_ylim(most - 0.4, -0.6)
        axis.set_xlim(min(0.98, 0.99 * gains.min()), 1.06 * max(gains.max(), 1.05))
        axis.set_title(f"{way}, geometric mean {geometric_mean(own):.2f}")
        axis.set_xlabel("the heuristic's time / the best plan's")
        axis.tick_params(left=False)
    source = f"{timed.iloc[0]['device']}; medians, caches cold, of every plan that was timed"
    return _finish(figure, "What tuning bought", source)


def landscape(data: Data) -> Figure:
    """Every plan that a search timed for a problem, by tile and warps."""
    if data.search.empty:
        raise NoData
    search = data.search
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
    for axis, table in zip(figure.axes, tables, strict=False):
        _mark(axis, table)
    frames = [Rectangle((0, 0), 1, 1, **style) for style in FRAMES.values()]
    figure.axes[0].legend(
        frames, FRAMES, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, fontsize=8
    )
    source = (
        f"{search.iloc[0]['device']}; medians in µs, caches cold; each cell has the best of its "
    )
    source += "plans, with its tile; *: stopped early; failed: did not run"
    return _finish(figure, "Tuning: every plan timed", source)


def _mark(axis: Axes, table: pd.DataFrame) -> None:
    """Frames the cell of the best plan and the heuristic's on a heat map."""
    names, warps = _axes_of(table)
    for name, style in FRAMES.items():
        for _, row in table[table[name].astype(bool)].iterrows():
            x, y, inset = warps.index(row["warps"]), names.index(row["cell"]), style["zorder"] / 100
            corner, side = (x - 0.5 + inset, y - 0.5 + inset), 1 - 2 * inset
            axis.add_patch(Rectangle(corner, side, side, **style))


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


def kept(rows: pd.DataFrame) -> Figure:
    """What whole networks keep for backward, as a share of what the stock network keeps."""
    rows = _pick(rows, status="counted")
    networks, ways = list(rows["network"].unique()), list(rows["way"].unique())
    figure, axis = plt.subplots(figsize=(8.2, 0.8 + 0.75 * len(networks)))
    height = 0.8 / len(ways)
    for i, way in enumerate(ways):
        own = rows[rows["way"] == way].set_index("network").reindex(networks)
        places = np.arange(len(networks)) + (i - (len(ways) - 1) / 2) * height
        bars = axis.barh(
            places, own["share"], 0.9 * height, label=way, color=WAYS.get(way, OTHER[0])
        )
        text = [
            "" if pd.isna(share) else f"{share:.2f} ({size / 2**20:.0f} MiB)"
            for share, size in zip(own["share"], own["kept_bytes"], strict=True)
        ]
        axis.bar_label(bars, text, padding=2, size=7)
    axis.set_yticks(range(len(networks)), networks)
    axis.set_ylim(len(networks) - 0.5, -0.5)
    axis.set_xlim(0, 1.25)
    axis.set_xlabel("share of what the stock network keeps")
    axis.tick_params(left=False)
    first = rows.iloc[0]
    title = f"Kept for backward, {first['batch']} images of {first['size']}×{first['size']}"
    source = f"counted on a CPU, no timings; {first['dtype']}, torch {first['torch']}"
    return _finish(figure, title, source, [axis])


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
        names, warps = _axes_of(table)
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


def _axes_of(table: pd.DataFrame) -> tuple[list[str], list[int]]:
    """What the lines and the columns of a heat map are."""
    return sorted(table["cell"].unique(), key=_by_number), sorted(set(table["warps"]))


def _by_number(cell: str) -> tuple[str, int]:
    name, number = cell.split(", ")
    return name, int("".join(filter(str.isdigit, number)))


#: The pictures of a folder's data, by file name.
PLOTS: dict[str, Callable[[Data], Figure]] = {
    "bandwidth": bandwidth,
    "speedup": speedup,
    "scaling": scaling,
    "channels": channels,
    "size": size,
    "memory": memory,
    "host": host,
    "step": step,
    "landscape": landscape,
    "tuned": tuned,
    "comparisons": comparisons,
    "waits": waits,
}


def draw(folder: Path) -> list[Path]:
    """Draws what a folder has data for: the files written."""
    figures: list[tuple[str, Callable[[], Figure]]] = []
    if (folder / "bench.json").exists():
        data = load(folder)
        figures += [(name, partial(plot, data)) for name, plot in PLOTS.items()]
    if (folder / "inspect.json").exists():
        facts = pd.DataFrame(json.loads((folder / "inspect.json").read_text(encoding="utf-8")))
        figures.append(("compile", partial(compile_facts, facts)))
    if (folder / "kept.json").exists():
        counted = pd.DataFrame(json.loads((folder / "kept.json").read_text(encoding="utf-8")))
        figures.append(("kept", partial(kept, counted)))
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
