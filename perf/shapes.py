"""Inputs of the batch normalizations of well-known networks, as plain data.

The four image networks are torchvision's ``resnet50``, ``mobilenet_v3_large``, ``efficientnet_b0``
and ``densenet121`` at 224 x 224, recorded by a hook on every ``BatchNorm2d``;
``tests/test_shapes.py`` does so again where torchvision is installed. U-Net 3d is the network of
Çiçek et al., "3D U-Net" (2016), with padded convolutions on patches of 128**3 voxels. Under MLP
stand sizes of BatchNorm1d: projection heads of self-supervised learning (SimCLR, Barlow Twins,
VICReg), and the convolution module of the Conformer on 400 frames.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from triton_bn.inspection.report import RESNET50

__all__ = ["EXTREMES", "NETWORKS", "Layer"]


class Layer(NamedTuple):
    """One input (N, channels, *spatial), and how many layers of the network have it."""

    channels: int
    spatial: tuple[int, ...]
    multiplicity: int = 1


def _densenet121() -> Iterator[Layer]:
    """A layer of a dense block normalizes what lies before it, then 128 channels, and adds 32.

    Behind a block all is normalized once more.
    """
    yield Layer(64, (112, 112))
    for size, channels, layers in ((56, 64, 6), (28, 128, 12), (14, 256, 24), (7, 512, 16)):
        widths = Counter(channels + 32 * i for i in range(layers + 1))
        widths[128] += layers
        for width in sorted(widths):
            yield Layer(width, (size, size), widths[width])


L = Layer
NETWORKS: dict[str, tuple[Layer, ...]] = {
    "ResNet-50": tuple(L(c, (h, w), layers) for c, h, w, layers in RESNET50),
    "MobileNetV3": (
        L(16, (112, 112), 3), L(64, (112, 112), 1), L(24, (56, 56), 2), L(64, (56, 56), 1),
        L(72, (56, 56), 3), L(40, (28, 28), 3), L(72, (28, 28), 1), L(120, (28, 28), 4),
        L(240, (28, 28), 1), L(80, (14, 14), 4), L(112, (14, 14), 2), L(184, (14, 14), 4),
        L(200, (14, 14), 2), L(240, (14, 14), 1), L(480, (14, 14), 2), L(672, (14, 14), 3),
        L(160, (7, 7), 3), L(672, (7, 7), 1), L(960, (7, 7), 5),
    ),
    "EfficientNet-B0": (
        L(16, (112, 112), 1), L(32, (112, 112), 2), L(96, (112, 112), 1), L(24, (56, 56), 2),
        L(96, (56, 56), 1), L(144, (56, 56), 3), L(40, (28, 28), 2), L(144, (28, 28), 1),
        L(240, (28, 28), 3), L(80, (14, 14), 3), L(112, (14, 14), 3), L(240, (14, 14), 1),
        L(480, (14, 14), 6), L(672, (14, 14), 5), L(192, (7, 7), 4), L(320, (7, 7), 1),
        L(672, (7, 7), 1), L(1152, (7, 7), 8), L(1280, (7, 7), 1),
    ),
    "DenseNet-121": tuple(_densenet121()),
    "U-Net 3d": (
        L(32, (128, 128, 128), 1), L(64, (128, 128, 128), 3), L(64, (64, 64, 64), 1),
        L(128, (64, 64, 64), 3), L(128, (32, 32, 32), 1), L(256, (32, 32, 32), 3),
        L(256, (16, 16, 16), 1), L(512, (16, 16, 16), 1),
    ),
    "MLP": (L(256, (), 1), L(2048, (), 1), L(8192, (), 2), L(512, (400,), 17)),
}  # fmt: skip

#: Whole input shapes at the ends of what is met, batch included.
EXTREMES: dict[str, tuple[int, ...]] = {
    "tiny": (2, 3),
    "tiny image": (8, 16, 4, 4),
    "one channel": (64, 1, 28, 28),
    "three channels": (256, 3, 224, 224),
    "table": (100_000, 32),
    "wide row": (4, 65_536),
    "one image": (1, 64, 2048, 2048),
    "over 2**31": (1024, 256, 112, 112),
}
