"""freeze: batch norms of a model stay in evaluation, whatever is done to it."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

import triton_bn
from triton_bn.conversion.convert import conversion_report, convert, revert


class Clipped(nn.BatchNorm2d):
    """A subclass with a forward of its own, which asks for the mode as PyTorch's does."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).clamp(-1, 1)


def network() -> Any:
    """Stock layers, one built as ours with an activation, two synchronized ones, a subclass."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(),
        triton_bn.BatchNorm2d(4, activation="silu"), nn.Conv2d(4, 4, 1), nn.SyncBatchNorm(4),
        triton_bn.SyncBatchNorm(4), Clipped(4),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (*module.parameters(), module.running_mean, module.running_var):
                tensor.data.uniform_(0.5, 1.5)
    return model


def layers(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def stays(model: Any, wanted: Tensor, x: Tensor, before: dict[str, Tensor]) -> None:
    """Trained as it is, the model gives what evaluation gives, and no statistic advances."""
    model.train()
    assert all(not layer.training for layer in layers(model))
    torch.testing.assert_close(model(x), wanted)
    assert same(state(model), before)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def twice(model: Any) -> Any:
    return triton_bn.freeze(triton_bn.freeze(model))


def converted_first(model: Any) -> Any:
    triton_bn.unfreeze(model)
    return triton_bn.freeze(convert(model))


def and_back(model: Any) -> Any:
    """Converted while frozen, and reverted: one layer has no twin, for its activation."""
    model[3] = triton_bn.freeze(copy.deepcopy(model[1]))
    return revert(convert(model))


CHANGES: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda model: model,
    "twice": twice,
    "deepcopy": copy.deepcopy,
    "pickled": pickled,
    "convert": convert,
    "convert, copied and pickled": lambda model: pickled(copy.deepcopy(convert(model))),
    "convert before": converted_first,
    "convert before, pickled": lambda model: pickled(converted_first(model)),
    "convert(sync=True)": lambda model: convert(model, sync=True),
    "eval and train": lambda model: model.eval().train(),
    "load_state_dict": lambda model: (model.load_state_dict(model.state_dict()), model)[1],
    "double and back": lambda model: model.double().float(),
}


@pytest.mark.parametrize("path", ["torch", "kernels"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_frozen_model_stays_in_evaluation(
    change: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if path == "kernels":
        monkeypatch.setattr("triton_bn.route.on_gpu", lambda x: True)
    model, x = network(), torch.randn(2, 3, 5, 5)
    before, wanted = state(model), model.eval()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # Clipped cannot be synchronized
        model = CHANGES[change](triton_bn.freeze(model.train()))
    stays(model, wanted, x, before)
    assert str(model).count("frozen") == len(layers(model)) == 5
    triton_bn.unfreeze(model)
    assert "frozen" not in str(model)
    assert all(layer.training for layer in layers(model))
    if not any(isinstance(layer, nn.SyncBatchNorm) for layer in model):  # which needs a GPU
        model(x)
        assert not same(state(model), before)
    model.eval()
    torch.testing.assert_close(triton_bn.freeze(model)(x), model(x))


def test_a_frozen_model_that_is_converted_and_reverted_is_frozen_stock() -> None:
    model = network()
    model[3] = nn.BatchNorm2d(4)
    model = triton_bn.freeze(model)
    before = [type(m) for m in model]
    assert revert(convert(model)) is model
    assert [type(m) for m in model][:6] == before[:6]
    assert type(model[6]).__mro__[2] is nn.SyncBatchNorm  # built as ours
    assert str(model).count("frozen") == 5
    assert [type(m) for m in triton_bn.unfreeze(model)][:4:2] == [nn.Conv2d, nn.ReLU]
    assert type(model[1]) is nn.BatchNorm2d


def test_frozen_layers_are_fused() -> None:
    model = triton_bn.freeze(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    row = conversion_report(convert(model)).rows[0]
    assert row.fused == "relu"
    assert isinstance(model[0], triton_bn.BatchNorm2d)


def test_parameters_have_no_gradients_until_unfrozen_and_others_stay_as_they_were() -> None:
    model = network()
    model[1].bias.requires_grad_(False)
    model[3].weight = model[1].weight  # shared
    triton_bn.freeze(model, parameters=True)
    model.train()(torch.randn(2, 3, 4, 4)).sum().backward()
    assert all(p.grad is None for layer in layers(model) for p in layer.parameters())
    assert model[0].weight.grad is not None
    model = pickled(copy.deepcopy(triton_bn.freeze(model)))
    assert not any(p.requires_grad for layer in layers(model) for p in layer.parameters())
    triton_bn.unfreeze(model)
    assert not model[1].bias.requires_grad
    assert all(
        p.requires_grad for layer in layers(model) for p in layer.parameters() if p is not model[1].bias
    )  # fmt: skip
    assert "_frozen_parameters" not in vars(model[1])


def test_what_cannot_be_frozen_is_named_and_left() -> None:
    model = nn.ModuleDict(
        {
            "none": nn.BatchNorm1d(3, track_running_stats=False),
            "lazy": nn.LazyBatchNorm1d(),
            "fine": nn.BatchNorm1d(3),
        }
    )
    with pytest.warns(UserWarning, match="not frozen") as warned:
        triton_bn.freeze(model, parameters=True)
    (warning,) = warned
    assert str(warning.message) == (
        "not frozen: none (without running statistics), lazy (not called yet)"
    )
    x = torch.randn(8, 3)
    assert torch.equal(
        model["none"](x), F.batch_norm(x, None, None, *model["none"].parameters(), True)
    )
    assert model["none"].weight.requires_grad
    model["lazy"](x)
    assert model["lazy"].running_mean.any()
    assert not model["fine"].weight.requires_grad
    with pytest.raises(TypeError, match="must be a torch"):
        triton_bn.freeze([model])  # type: ignore[type-var]


def test_parametrized_and_pruned_layers() -> None:
    class Twice(nn.Module):
        def forward(self, w: Tensor) -> Tensor:
            return 2 * w

    layer = nn.BatchNorm1d(3)
    x, before = torch.randn(8, 3), state(layer)
    parametrize.register_parametrization(layer, "weight", Twice())
    triton_bn.freeze(layer, parameters=True).train()
    assert torch.equal(layer(x), 2 * F.batch_norm(x, torch.zeros(3), torch.ones(3)))
    assert not layer(x).requires_grad
    convert(layer)
    torch.testing.assert_close(layer(x), 2 * x, atol=1e-4, rtol=1e-4)
    assert "frozen" in str(layer)
    parametrize.remove_parametrizations(layer, "weight")
    assert "frozen" in str(layer)
    triton_bn.unfreeze(layer)
    assert type(layer) is triton_bn.BatchNorm1d
    assert not layer.running_mean.any() and layer.running_mean.equal(before["running_mean"])

    layer = triton_bn.freeze(nn.BatchNorm1d(3), parameters=True)
    prune.l1_unstructured(layer, "weight", 1)
    prune.remove(layer, "weight")
    assert triton_bn.unfreeze(layer).bias.requires_grad


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace:DeprecationWarning")
def test_compiled_exported_traced_and_recomputed() -> None:
    model, x = network()[:5], torch.randn(2, 3, 5, 5)
    before, wanted = state(model), model.eval()(x)
    compiled = torch.compile(model, backend="aot_eager")
    model.train()
    assert not torch.allclose(compiled(x), wanted)
    model.load_state_dict(before)
    triton_bn.freeze(model)  # what was compiled before is compiled again
    torch.testing.assert_close(compiled(x), wanted)
    convert_and_compile = torch.compile(convert(copy.deepcopy(model)), backend="aot_eager")
    torch.testing.assert_close(convert_and_compile.train()(x), wanted)
    for strict in (False, True):
        program = torch.export.export(model, (x,), strict=strict)
        torch.testing.assert_close(program.module()(x), wanted)
        assert not [n for n in program.graph.nodes if "add_" in str(n.target)]
    torch.testing.assert_close(torch.jit.trace(model, x)(x), wanted)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(x), wanted)
    with triton_bn.recompute():
        y = model.train()(x)
    y.sum().backward()
    torch.testing.assert_close(y, wanted)
    assert same(state(model), before)
