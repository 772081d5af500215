"""Whole networks of which it is counted what training keeps: torchvision's, and a U-Net.

torchvision is not in the ``perf`` extra, as nothing that is timed needs it (:mod:`perf.resnet`).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["NETWORKS", "checkpointed", "torchvision"]

#: What torchvision registers an implementation for as it is imported. Its compiled operators load
#: only beside the very build of torch they were compiled for.
OPERATORS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
LIBRARIES: list[torch.library.Library] = []  # an operator lives as long as the library that has it


def torchvision() -> Any:
    """torchvision, whatever torch it was compiled for: its models need none of its operators.

    Raises:
        ImportError: where it is not installed.
    """
    if "torchvision" not in sys.modules:
        try:
            importlib.import_module("torchvision")
        except RuntimeError:  # operator torchvision::nms does not exist
            for module in [name for name in sys.modules if name.startswith("torchvision")]:
                del sys.modules[module]
            LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))
            for schema in OPERATORS:
                LIBRARIES[0].define(schema)
    return importlib.import_module("torchvision")


class Double(nn.Sequential):
    """Two 3 × 3 convolutions, each with batch normalization and ReLU behind it."""

    def __init__(self, inputs: int, outputs: int) -> None:
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [
                nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
            ]
        super().__init__(*layers)


class UNet(nn.Module):
    """Ronneberger et al., "U-Net: Convolutional Networks for Biomedical Image Segmentation", 2015.

    With padding, and batch normalization behind every convolution, as it is built today.
    """

    def __init__(self, width: int = 32, depth: int = 4, classes: int = 2) -> None:
        super().__init__()
        widths = [width << level for level in range(depth + 1)]
        self.down = nn.ModuleList(Double(*pair) for pair in zip([3, *widths], widths, strict=False))
        self.pool = nn.MaxPool2d(2)
        steps = [(widths[level + 1], widths[level]) for level in reversed(range(depth))]
        self.up = nn.ModuleList(nn.ConvTranspose2d(*step, 2, stride=2) for step in steps)
        self.merge = nn.ModuleList(Double(*step) for step in steps)
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = [self.down[0](x)]
        for block in self.down[1:]:  # type: ignore[union-attr]
            kept.append(block(self.pool(kept[-1])))
        x = kept.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            x = merge(torch.cat([up(x), kept.pop()], 1))
        return self.head(x)  # type: ignore[no-any-return]


def of_torchvision(name: str) -> nn.Module:
    model: nn.Module = getattr(torchvision().models, name)(weights=None)
    return model


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-50": partial(of_torchvision, "resnet50"),
    "MobileNetV2": partial(of_torchvision, "mobilenet_v2"),
    "EfficientNet-B0": partial(of_torchvision, "efficientnet_b0"),
    "DenseNet-121": partial(of_torchvision, "densenet121"),
    "U-Net": UNet,
}

#: What is usually put under a checkpoint: the blocks that a network repeats.
_BLOCKS = ("Bottleneck", "InvertedResidual", "MBConv", "Double")


def checkpointed(model: nn.Module) -> nn.Module:
    """``model``, with each of its blocks under ``torch.utils.checkpoint``."""
    for module in model.modules():
        if hasattr(module, "memory_efficient"):  # DenseNet's own way: its blocks' lists grow
            module.memory_efficient = True
        if type(module).__name__ in _BLOCKS:
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)  # type: ignore[method-assign]
    return model
