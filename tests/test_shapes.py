"""The networks' shapes are those that the networks have."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from packages import torchvision

from perf.shapes import NETWORKS

CONSTRUCTORS = {
    "ResNet-50": "resnet50",
    "MobileNetV3": "mobilenet_v3_large",
    "EfficientNet-B0": "efficientnet_b0",
    "DenseNet-121": "densenet121",
}


@pytest.mark.parametrize(
    ("network", "layers"),
    [
        ("ResNet-50", 53),
        ("MobileNetV3", 46),
        ("EfficientNet-B0", 49),
        ("DenseNet-121", 121),
        ("U-Net 3d", 14),
    ],
)
def test_every_layer_is_counted_once(network: str, layers: int) -> None:
    assert sum(layer.multiplicity for layer in NETWORKS[network]) == layers
    inputs = [layer[:2] for layer in NETWORKS[network]]
    assert len(set(inputs)) == len(inputs)


@pytest.mark.models
@pytest.mark.parametrize("network", list(CONSTRUCTORS))
def test_shapes_are_those_that_torchvision_s_model_has(network: str) -> None:
    models = torchvision().models
    seen: Counter[tuple[int, ...]] = Counter()
    with torch.device("meta"):
        model = getattr(models, CONSTRUCTORS[network])()
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.register_forward_pre_hook(
                    lambda _, inputs: seen.update([inputs[0].shape[1:]])
                )
        model(torch.empty(2, 3, 224, 224))
    assert seen == {
        (layer.channels, *layer.spatial): layer.multiplicity for layer in NETWORKS[network]
    }
