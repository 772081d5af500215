"""``convert`` on architectures whose code is not ours: torchvision, timm, transformers."""

from __future__ import annotations

import copy
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from packages import package, torchvision
from torch import Tensor, nn
from torch.nn.utils import fuse_conv_bn_eval

from triton_bn import BatchNorm2d, route
from triton_bn.conversion import fuse
from triton_bn.conversion.convert import conversion_report, convert, revert

pytestmark = pytest.mark.models


def of_torchvision(name: str) -> Callable[[], nn.Module]:
    return lambda: getattr(torchvision().models, name)(num_classes=10)


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torchvision()  # which timm imports
        return package("timm").create_model(name, num_classes=10, **options)

    return make


class Logits(nn.Module):
    """Of a model of transformers, the pooled output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).pooler_output


def of_transformers(layer: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torchvision()  # which transformers imports where it is there
        transformers = package("transformers")
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2], layer_type=layer
        )
        return Logits(transformers.ResNetModel(config))

    return make


@dataclass(frozen=True)
class Case:
    name: str
    make: Callable[[], nn.Module]
    #: How many layers take up what.
    fused: dict[str, int]


RESNET18 = {"relu": 9, "add + relu": 8, "": 3}
MOBILENET = {"hardswish": 18, "relu": 5, "add": 6, "": 5}
CASES = [
    Case("torchvision resnet18", of_torchvision("resnet18"), RESNET18),
    Case("torchvision resnet50", of_torchvision("resnet50"), {"relu": 33, "add + relu": 16, "": 4}),
    Case(
        "torchvision mobilenet_v2", of_torchvision("mobilenet_v2"), {"relu6": 35, "add": 10, "": 7}
    ),
    Case("torchvision mobilenet_v3_small", of_torchvision("mobilenet_v3_small"), MOBILENET),
    Case("torchvision densenet121", of_torchvision("densenet121"), {"relu": 121}),
    # Its adds are behind stochastic depth.
    Case("torchvision efficientnet_b0", of_torchvision("efficientnet_b0"), {"silu": 33, "": 16}),
    Case(
        "torchvision regnet_y_400mf",
        of_torchvision("regnet_y_400mf"),
        {"relu": 33, "add + relu": 16, "": 4},
    ),
    Case(
        "torchvision shufflenet_v2_x0_5", of_torchvision("shufflenet_v2_x0_5"), {"relu": 37, "": 19}
    ),
    Case("timm resnet18", of_timm("resnet18"), RESNET18),
    Case("timm resnet26d", of_timm("resnet26d"), {"relu": 19, "add + relu": 8, "": 4}),
    Case("timm efficientnet_b0", of_timm("efficientnet_b0"), {"silu": 33, "add": 9, "": 7}),
    Case(
        "timm efficientnet_b0 with drop path",
        of_timm("efficientnet_b0", drop_path_rate=0.2),
        {"silu": 33, "": 16},
    ),
    Case(
        "timm mobilenetv3_small_050",
        of_timm("mobilenetv3_small_050"),
        {"hardswish": 18, "relu": 5, "add": 7, "": 4},
    ),
    Case("timm densenet121", of_timm("densenet121"), {"relu": 121}),
    Case(
        "transformers ResNet, basic", of_transformers("basic"), {"relu": 5, "add + relu": 4, "": 2}
    ),
    Case(
        "transformers ResNet, bottleneck",
        of_transformers("bottleneck"),
        {"relu": 9, "add + relu": 4, "": 2},
    ),
]


def observe(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of a step in training, and of one in evaluation after it."""
    found: dict[str, Tensor] = {}
    for mode in (True, False):
        model.train(mode)
        model.zero_grad()
        x = image.clone().requires_grad_()
        torch.manual_seed(1)  # dropout and stochastic depth
        output = model(x)
        weights = torch.linspace(-1, 1, output.numel(), dtype=x.dtype).view_as(output)
        (output * weights).sum().backward()
        found[f"output {mode}"], found[f"gradient of input {mode}"] = output.detach(), x.grad
        for name, parameter in model.named_parameters():
            found[f"gradient of {name} {mode}"] = parameter.grad.clone()
        for name, buffer in model.named_buffers():
            found[f"buffer {name} {mode}"] = buffer.clone()
    return found


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """In float64, up to roundings that the network amplifies less than 1e5 times."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        error = (actual[name] - tensor).abs().max().item()
        allowed = 1e5 * torch.finfo(torch.float64).eps * max(tensor.abs().max().item(), 1.0)
        assert error <= allowed, f"{name}: {error:g} of {allowed:g}"


def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[nn.Module, str]]:
    """Which layers have fused what, as calls come."""
    found: list[tuple[nn.Module, str]] = []
    compute = fuse.Pending.compute

    def recorded(self: Any, activation: Any = None) -> Tensor:
        parts = ["add" if self.residual is not None else "", str(activation or "")]
        found.append((self.layer, " + ".join(filter(None, parts))))
        return compute(self, activation)

    monkeypatch.setattr(fuse.Pending, "compute", recorded)
    return found


def fuse_with_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be fused is, as on a GPU; PyTorch computes it: the kernels have tests of their own."""
    monkeypatch.setattr(route, "on_gpu", lambda x: True)
    monkeypatch.setattr("triton_bn.functional.route", lambda *_, **__: "torch")


def trained(case: Case) -> nn.Module:
    torch.manual_seed(0)
    model = case.make().double()
    for layer in model.modules():  # a 0 or 1, as after initialization, would hide mistakes
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            for name in ("weight", "bias", "running_mean", "running_var"):
                getattr(layer, name).data.uniform_(0.5, 1.5)
    return model


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_converted_model_computes_what_it_did(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse_with_torch(monkeypatch)
    model = trained(case)
    original, fresh = copy.deepcopy(model), case.make().double()
    assert convert(model) is model
    report = conversion_report(model)
    assert Counter(row.fused for row in report.rows) == case.fused
    assert not report.left

    assert isinstance(model, type(original))
    assert repr(model).replace("triton_bn.", "") == repr(original)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in original.named_modules()]
    fresh.load_state_dict(model.state_dict())
    convert(fresh).load_state_dict(original.state_dict())

    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    original.eval(), fresh.eval()
    with torch.no_grad():
        assert_same({"output": fresh(image)}, {"output": original(image)})
    seen = computed(monkeypatch)
    names = {module: name for name, module in model.named_modules()}
    assert_same(observe(model, image), observe(original, image))
    # What the report says is what happened, in training and in evaluation.
    told = {row.name: row.fused for row in report.rows if row.fused}
    assert {names[layer]: label for layer, label in seen if label} == told

    revert(model)
    for module, before in zip(model.modules(), original.modules(), strict=True):
        assert type(module) is type(before)
        assert vars(module).keys() == vars(before).keys()


def folded(model: nn.Module) -> nn.Module:
    """Each layer that stands behind a convolution folded into it, an identity in its place."""
    for module in list(model.modules()):
        children = list(module.named_children())
        for (_, conv), (name, layer) in pairwise(children):
            norm = type(layer).__name__.startswith("BatchNorm") and not hasattr(layer, "act")
            if isinstance(conv, nn.Conv2d) and norm and conv.out_channels == layer.num_features:
                folding = fuse_conv_bn_eval(conv, layer)
                conv.weight, conv.bias = folding.weight, folding.bias
                setattr(module, name, nn.Identity())
    return model


def features(model: nn.Module, other: nn.Module) -> nn.Module:
    """Some values from inside, as detectors take them, by names that both models' graphs have."""
    extraction = package("torchvision.models.feature_extraction")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # fewer nodes in evaluation than in training
        names, others = (extraction.get_graph_node_names(m)[1] for m in (model, other))
        common = [name for name in names if name in others]
        assert len(common) > 10
        taken = common[:: max(len(common) // 5, 1)] + common[-1:]
        extractor: nn.Module = extraction.create_feature_extractor(model, {n: n for n in taken})
    return extractor


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_converted_model_is_synchronized_extracted_from_and_deployed(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    fuse_with_torch(monkeypatch)
    stock = trained(case).eval()
    model = convert(copy.deepcopy(stock))
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    changes: list[Callable[[nn.Module], nn.Module]] = [
        nn.SyncBatchNorm.convert_sync_batchnorm,
        package("timm.layers").convert_sync_batchnorm,
        folded,
    ]
    with torch.no_grad():
        for change in changes:
            results = [{"output": change(copy.deepcopy(m))(image)} for m in (model, stock)]
            assert_same(*results)
        if "transformers" not in case.name:  # which torch.fx does not trace
            results = [features(model, stock)(image), features(stock, model)(image)]
            tensors = [{n: v for n, v in r.items() if isinstance(v, Tensor)} for r in results]
            names = tensors[0].keys() & tensors[1].keys()
            assert len(names) > 1
            assert_same(*({n: found[n] for n in names} for found in tensors))


def test_a_converted_model_is_reparameterized(monkeypatch: pytest.MonkeyPatch) -> None:
    fuse_with_torch(monkeypatch)
    stock = trained(Case("timm repvgg_a0", of_timm("repvgg_a0"), {})).eval()
    model = convert(copy.deepcopy(stock))
    assert len(conversion_report(model).fused) > 20
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = {"output": stock(image)}
        assert_same({"output": model(image)}, expected)
        deployed = package("timm.utils").reparameterize_model(model)
        assert_same({"output": deployed(image)}, expected)


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("act", ["relu", "prelu", None])
@pytest.mark.parametrize("drop", [None, nn.Dropout])
def test_timms_layer_is_ours_with_whatever_stands_behind_it(
    fuse: bool, act: str | None, drop: Any
) -> None:
    torchvision()
    layer = package("timm.layers").BatchNormAct2d(
        3, apply_act=act is not None, act_layer=act or "relu", drop_layer=drop
    )
    original = layer.double()
    model: Any = convert(copy.deepcopy(original), fuse=fuse)
    assert isinstance(model, BatchNorm2d)
    assert isinstance(model, type(original))
    folds = fuse and act == "relu" and drop is None
    assert [row.fused for row in conversion_report(model).rows] == ["relu" if folds else ""]
    image = torch.randn(2, 3, 4, 5, dtype=torch.float64)
    assert_same(observe(model, image), observe(original, image))
    assert type(revert(model)) is type(original)
    assert repr(model) == repr(original)


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_050"])
def test_features_by_timm(name: str) -> None:
    """timm's own extraction by torch.fx takes a converted model, and gives what it gives for the stock one."""
    stock = of_timm(name)().double()
    converted = convert(copy.deepcopy(stock))
    graph = package("timm.models._features_fx").FeatureGraphNet
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    taken = (0, 1, 2)
    torch.testing.assert_close(graph(converted, taken)(image), graph(stock, taken)(image))
