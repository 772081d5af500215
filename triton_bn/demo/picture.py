"""The demo's picture: losses, accuracies, errors by layer, digits and what was read in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from triton_bn.demo.lockstep import Difference

__all__ = ["NAMES", "draw"]

NAMES = {"torch": "torch.nn", "ours": "triton_bn"}
COLORS = {"torch": "#c46a1a", "ours": "#2b5fa8"}
RED = "#b3261e"
MARKERS = {"y": "o", "dx": "s", "dresidual": "D", "dweight": "^", "dbias": "v"}


def draw(
    path: Path,
    where: str,
    loss: Mapping[str, Sequence[float]],
    accuracy: Mapping[str, Sequence[float]],
    worst: Mapping[tuple[str, str], Mapping[str, Difference]],
    images: Tensor,
    labels: Tensor,
    read: Mapping[str, Tensor],
) -> None:
    """Writes the picture to ``path``. The mappings are those of :class:`triton_bn.demo.digits.Training`,
    ``images`` (N, 1, 8, 8), and ``labels`` and ``read`` (N,) what is and what was seen in them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure = plt.figure(figsize=(13, 8), layout="constrained")
    figure.suptitle(
        f"triton_bn beside torch.nn.BatchNorm2d on scanned digits, {where}", fontsize=14
    )
    panels: Any = figure.subfigures(2, 1, height_ratios=(1.4, 1))
    top, bottom = panels
    left, middle, right = top.subplots(1, 3, width_ratios=(1.25, 0.8, 1.35))
    _losses(left, loss)
    _accuracies(middle, accuracy)
    _errors(right, worst)
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    _digits(bottom, images.cpu().numpy(), labels.tolist(), {n: t.tolist() for n, t in read.items()})
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _losses(axis: Any, loss: Mapping[str, Sequence[float]]) -> None:
    for name, style in (("torch", {"linewidth": 5, "alpha": 0.45}), ("ours", {"linewidth": 1.3})):
        axis.plot(loss[name], color=COLORS[name], label=NAMES[name], **style)
    axis.set(title="training loss", xlabel="step", yscale="log")
    axis.legend(frameon=False)


def _accuracies(axis: Any, accuracy: Mapping[str, Sequence[float]]) -> None:
    epochs = range(1, len(accuracy["ours"]) + 1)
    for name, offset, alpha in (("torch", -0.2, 0.45), ("ours", 0.2, 1.0)):
        at = [epoch + offset for epoch in epochs]
        bars = axis.bar(
            at, [100 * a for a in accuracy[name]], 0.38, color=COLORS[name], alpha=alpha
        )
        axis.bar_label(bars, fmt="%.1f", fontsize=7, padding=2)
    lowest = 100 * min(min(values) for values in accuracy.values())
    axis.set(title="test accuracy, %", xlabel="epoch", ylim=(max(lowest - 10, 0), 101.5))
    axis.set_xticks(list(epochs))


def _errors(axis: Any, worst: Mapping[tuple[str, str], Mapping[str, Difference]]) -> None:
    """The largest errors, as multiples of what is allowed: ours filled, torch's hollow."""
    rows = sorted(worst)
    results = list(dict.fromkeys(name for row in worst.values() for name in row))
    for index, name in enumerate(results):
        places = [place for place, row in enumerate(rows) if name in worst[row]]
        found = [worst[rows[place]][name] for place in places]
        heights = [place + 0.11 * ((len(results) - 1) / 2 - index) for place in places]
        style = {"marker": MARKERS.get(name, "P" if name == "running_mean" else "X"), "s": 30}
        color = f"C{index}"
        axis.scatter(
            [_shown(d.theirs) for d in found], heights, edgecolors=color, facecolors="none", **style
        )
        label = name.replace("_", " ")
        axis.scatter([_shown(d.ours) for d in found], heights, color=color, label=label, **style)
    axis.axvline(1, color=RED, linewidth=1.5)
    axis.text(1.08, len(rows) - 0.4, "beyond float32", color=RED, va="bottom", fontsize=8)
    axis.set_yticks(range(len(rows)), [f"{layer}\n{layout}" for layer, layout in rows], fontsize=8)
    axis.set(xscale="log", ylim=(-0.6, len(rows) - 0.1))
    axis.set_title("largest error / what float32 may lose\n(hollow: torch's own)", fontsize=11)
    axis.set_xlim(right=max(axis.get_xlim()[1], 10))
    axis.grid(axis="x", alpha=0.3)
    axis.legend(fontsize=7, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))


def _shown(ratio: float) -> float:
    """On the logarithmic axis: zero and infinity at its ends."""
    return max(min(ratio, 1e6), 1e-3)


def _digits(
    figure: Any,
    images: Any,
    labels: Sequence[int],
    read: Mapping[str, Sequence[int]],
    columns: int = 16,
) -> None:
    """Two rows of test images, those that either network misreads first."""
    right = [labels[i] == read["torch"][i] == read["ours"][i] for i in range(len(labels))]
    figure.suptitle(
        f"test digits, the {right.count(False)} misread of {len(labels)} first; "
        "below each what triton_bn / torch.nn read",
        fontsize=11,
    )
    order = sorted(range(len(labels)), key=lambda i: right[i])
    for axis, i in zip(figure.subplots(2, columns).flat, order, strict=False):
        axis.imshow(images[i, 0], cmap="gray_r", interpolation="nearest")
        text = f"{read['ours'][i]} / {read['torch'][i]}"
        if not right[i]:
            text += f"  is {labels[i]}"
        axis.set_xlabel(text, color="black" if right[i] else RED, fontsize=9)
        axis.set_xticks([])
        axis.set_yticks([])
