"""What is measured, and in which order: the most telling first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import torch

from perf.shapes import EXTREMES, NETWORKS, Layer

__all__ = ["NETWORKS", "OPS", "TRAIN", "Case", "select"]

#: What follows the normalization: ``y = relu(bn(x) + residual)`` and its parts.
OPS = ("bn", "bn+relu", "bn+add+relu")

#: Timed of one set of tensors in training: each apart, and one after the other.
TRAIN = ("forward", "backward", "forward+backward")


@dataclass(frozen=True)
class Case:
    """One set of tensors, and what is measured of it.

    ``measures`` are "forward", "backward", "forward+backward" (batch statistics), "eval" (running
    statistics, no gradient), "memory" (of forward+backward), "host" (the host's time for
    forward+backward, on a tensor so small that the GPU's does not matter), or "step": a training
    step of the whole network, whose op is "model".
    """

    network: str
    #: (N, C, *spatial)
    shape: tuple[int, ...]
    layout: str
    dtype: str
    op: str
    measures: tuple[str, ...]
    #: How often the network has this batch norm.
    layers: int = 1
    question: str = ""

    @property
    def key(self) -> tuple[str, str, str, str, str]:
        return self.question, "x".join(map(str, self.shape)), self.layout, self.dtype, self.op

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def memory_format(self) -> torch.memory_format:
        last = {4: torch.channels_last, 5: torch.channels_last_3d}
        return last[len(self.shape)] if self.layout == "channels_last" else torch.contiguous_format

    @property
    def training(self) -> bool:
        return self.measures != ("eval",)

    @property
    def residual(self) -> bool:
        return "add" in self.op

    def traffic(self, measure: str) -> list[tuple[int, int]]:
        """Tensors of the input's size that must be read and written at least, launch by launch.

        A residual is read in forward, and its gradient written in backward. What the activation's
        slope takes (y, a bit a value, or nothing) is left out.
        """
        forward, backward = (1 + self.residual, 1), (2, 1 + self.residual)
        passes = {
            "forward": [forward],
            "eval": [forward],
            "backward": [backward],
            "forward+backward": [forward, backward],
        }
        return passes.get(measure, [])

    def bytes(self, measure: str) -> int:
        """The bytes of :meth:`traffic`."""
        tensor = math.prod(self.shape) * self.torch_dtype.itemsize
        return tensor * sum(reads + writes for reads, writes in self.traffic(measure))

    def __str__(self) -> str:
        return " ".join(filter(None, (self.network, *self.key)))


def layouts(spatial: tuple[int, ...]) -> tuple[str, ...]:
    return ("contiguous", "channels_last") if len(spatial) > 1 else ("contiguous",)


def cost(layer: Layer) -> int:
    """The layer's share of its network's batch norms, in values an image."""
    return layer.multiplicity * layer.channels * math.prod(layer.spatial)


def of_network(
    network: str,
    batches: Iterable[int],
    dtypes: Iterable[str] = ("bfloat16",),
    ops: Iterable[str] = ("bn",),
    measures: tuple[str, ...] = TRAIN,
    most: int | None = None,
) -> Iterator[Case]:
    """Cases of the ``most`` costly layers of a network (of all by default), the costliest first."""
    shapes = sorted(NETWORKS[network], key=cost, reverse=True)[:most]
    for batch in batches:
        for dtype in dtypes:
            for op in ops:
                for layer in shapes:
                    shape = (batch, layer.channels, *layer.spatial)
                    for layout in layouts(layer.spatial):
                        yield Case(network, shape, layout, dtype, op, measures, layer.multiplicity)


#: Batch sizes of the other networks as they are trained on one GPU; 128 where none is given.
BATCHES = {"U-Net 3d": (2,), "DenseNet-121": (64,), "MLP": (1024,)}


def extremes(names: Iterable[str], measures: tuple[str, ...]) -> Iterator[Case]:
    for name in names:
        for layout in layouts(EXTREMES[name][2:]):
            yield Case(name, EXTREMES[name], layout, "bfloat16", "bn", measures)


#: Two layers of ResNet-50 that no program can hold a channel of, and two where one can.
TELLING = {256: ((256, 56, 56), (64, 112, 112)), 32: ((1024, 14, 14), (2048, 7, 7))}


def telling() -> Iterator[Case]:
    """The first half minute: what is fused, in both layouts, then memory and the host."""
    resnet = "ResNet-50"
    layers = {(layer.channels, *layer.spatial): layer.multiplicity for layer in NETWORKS[resnet]}
    for op in OPS:
        for batch, inputs in TELLING.items():
            for each in inputs:
                for layout in layouts(each[1:]):
                    shape = (batch, *each)
                    yield Case(resnet, shape, layout, "bfloat16", op, TRAIN, layers[each])
    for op in OPS:
        yield Case(resnet, (128, 256, 56, 56), "channels_last", "bfloat16", op, ("memory",))
    for op in OPS:
        for case in extremes(["tiny image"], ("host",)):
            yield replace(case, op=op)


def steps() -> Iterator[Case]:
    """A training step of ResNet-50, as it is and compiled: minutes, most of them the compiler's."""
    for measure in ("step", "compiled step"):
        shape = (128, 3, 224, 224)
        yield Case("ResNet-50", shape, "channels_last", "bfloat16", "model", (measure,))


def ordered() -> Iterator[Case]:
    """Every case, the most telling first; some come twice."""
    resnet = "ResNet-50"
    yield from telling()
    yield from of_network(resnet, [256, 32], most=4)
    yield from of_network(resnet, [256], ops=["bn+add+relu", "bn+relu"], most=4)
    yield from of_network(resnet, [256, 32])
    # How cost grows with the channels: one size of image and batch, 8 to 2048 of them.
    for channels in (8, 16, 32, 128, 512, 2048):
        for layout in layouts((14, 14)):
            yield Case("channel sweep", (32, channels, 14, 14), layout, "bfloat16", "bn", TRAIN)
    # How cost grows: the middle of the network, batch 1 to 256.
    for batch in (1, 2, 4, 8, 16, 64, 128):
        for layout in layouts((14, 14)):
            yield Case(resnet, (batch, 1024, 14, 14), layout, "bfloat16", "bn", TRAIN)
    for network in NETWORKS:
        if network != resnet:
            yield from of_network(network, BATCHES.get(network, (128,)), most=3)
    yield from of_network(resnet, [32, 256], dtypes=["float16", "float32"], most=4)
    yield from of_network(resnet, [1, 32, 256], ops=OPS, measures=("eval",), most=4)
    yield from of_network(resnet, [64, 128])
    yield from of_network(resnet, [256, 32], ops=OPS)
    yield from extremes(EXTREMES, TRAIN)
    for network in NETWORKS:
        batches = BATCHES.get(network, (128,))
        yield from of_network(network, batches, ["bfloat16", "float16", "float32"], OPS)
    yield from steps()


def select(words: Iterable[str] = ()) -> tuple[Case, ...]:
    """Every case once, in the order in which a budget is spent: those that have all the words."""
    cases: dict[tuple[object, ...], Case] = {}
    for case in ordered():
        cases.setdefault((case.key, case.measures), case)
    return tuple(
        case for case in cases.values() if set(words) <= {*case.key, *case.measures, case.network}
    )
