"""``convert`` and ``revert`` against the model they were given: results, gradients, all else."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

import triton_bn
from triton_bn import route
from triton_bn.conversion import fuse, replace, rewrite
from triton_bn.conversion.convert import conversion_report, convert, revert


@pytest.fixture(autouse=True)
def plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """What computes a layer is tested elsewhere: here PyTorch does, and what can be fused is."""
    monkeypatch.setattr(route, "on_gpu", lambda x: True)
    monkeypatch.setattr("triton_bn.functional.route", lambda *_, **__: "torch")


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    torch.manual_seed(0)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What each call of a layer that a forward of ours made has fused."""
    found: list[str] = []
    compute = fuse.Pending.compute

    def recorded(self: Any, activation: Any = None) -> Tensor:
        parts = ["add" if self.residual is not None else "", str(activation or "")]
        found.append(" + ".join(filter(None, parts)))
        return compute(self, activation)

    monkeypatch.setattr(fuse.Pending, "compute", recorded)
    return found


def fused(model: nn.Module) -> list[str]:
    return [row.fused for row in conversion_report(model).rows]


def notes(model: nn.Module) -> list[str]:
    return [row.note for row in conversion_report(model).rows]


def observe(model: nn.Module, *inputs: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of a step in training, then of one in evaluation."""
    found: dict[str, Tensor] = {}
    for mode in (True, False):
        model.train(mode)
        model.zero_grad()
        leaves = [i.detach().clone().requires_grad_() for i in inputs]
        torch.manual_seed(1)
        output = model(*leaves)
        weights = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)
        (output * weights).sum().backward()
        found[f"output {mode}"] = output.detach()
        for name, tensor in [*enumerate(leaves), *model.named_parameters()]:
            assert tensor.grad is not None, name
            found[f"gradient of {name} {mode}"] = tensor.grad.clone()
        for name, buffer in model.named_buffers():
            found[f"buffer {name} {mode}"] = buffer.clone()
    return found


def assert_same(model: nn.Module, converted: nn.Module, *inputs: Tensor) -> None:
    """In float64, up to roundings, which the few layers here amplify less than 1e5 times."""
    expected, actual = observe(model, *inputs), observe(converted, *inputs)
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        assert actual[name].dtype == tensor.dtype, name
        error = (actual[name] - tensor).abs().max().item()
        allowed = 1e5 * torch.finfo(torch.float64).eps * max(tensor.abs().max().item(), 1.0)
        assert error <= allowed, f"{name}: {error:g}"


def randomize(model: nn.Module) -> nn.Module:
    """Parameters and buffers of a layer that has been trained: a 1 or a 0 would hide mistakes."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                if tensor.is_floating_point():
                    tensor.data.uniform_(0.5, 1.5)
    return model.double()


def images(channels: int = 3) -> Tensor:
    return torch.randn(4, channels, 5, 7, dtype=torch.float64)


class Block(nn.Module):
    """A residual block as most libraries write it."""

    def __init__(self, down: bool = False, inplace: bool = True) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace)
        self.down = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)) if down else None

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.down is not None:
            identity = self.down(x)
        out += identity
        return self.relu(out)


class Net(nn.Module):
    """A stem, blocks, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.blocks = nn.Sequential(Block(), Block(down=True))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.relu(self.norm(self.stem(x))))
        return self.head(x.mean((2, 3)))


def net() -> Any:
    return randomize(Net())


# ------------------------------------------------------------------------------------ replacing


@pytest.mark.parametrize("name", ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"])
def test_a_layer_stays_the_object_it_was(name: str) -> None:
    layer: Any = getattr(nn, name)(4, eps=1e-3, momentum=None, dtype=torch.bfloat16)
    layer.eval().weight.requires_grad_(False)
    layer.register_buffer("note", torch.zeros(1), persistent=False)
    layer.remark = "mine"
    seen: list[str] = []
    layer.register_forward_pre_hook(lambda *_: seen.append("before"))
    layer.register_forward_hook(lambda *_: seen.append("after"))
    layer._register_state_dict_hook(lambda *_: seen.append("state"))
    before, keys = dict(vars(layer)), list(layer.state_dict())
    assert convert(layer) is layer
    assert type(layer) is getattr(triton_bn, name)
    assert all(vars(layer)[key] is value for key, value in before.items())
    assert list(layer.state_dict()) == keys
    size = {"BatchNorm2d": (2, 4, 3, 3), "BatchNorm3d": (2, 4, 3, 3, 3)}.get(name, (2, 4))
    layer(torch.ones(size, dtype=torch.bfloat16))
    assert seen == ["state", "state", "before", "after"]
    assert conversion_report(layer).rows[0].after == f"triton_bn.{name}"
    revert(layer)
    assert type(layer) is getattr(nn, name)
    assert vars(layer).keys() == before.keys()
    assert all(vars(layer)[key] is value for key, value in before.items())


def test_optimizers_lists_and_other_models_hold_the_converted_layer() -> None:
    model = net()
    model.norms = [model.norm]
    other = nn.Sequential(model.norm)
    twin = copy.deepcopy(model)
    optimizers = [torch.optim.SGD(m.parameters(), 0.1) for m in (model, twin)]
    convert(model)
    assert model.norms[0] is other[0] is model.norm
    assert type(other[0]) is triton_bn.BatchNorm2d
    x = images()
    for m, optimizer in zip((model, twin), optimizers, strict=True):
        m(x).square().sum().backward()
        optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_layer_in_two_places_stays_one() -> None:
    norm = nn.BatchNorm2d(3)
    model = randomize(nn.Sequential(nn.Conv2d(3, 3, 1), norm, nn.ReLU(), nn.Conv2d(3, 3, 1), norm))
    original = copy.deepcopy(model)
    convert(model)
    assert model[1] is model[4]
    assert fused(model) == ["relu"]
    assert_same(original, model, images())


def test_a_parametrized_layer_keeps_its_parametrization() -> None:
    class Positive(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.exp()

    model = randomize(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)))
    parametrize.register_parametrization(model[1], "weight", Positive())
    original = copy.deepcopy(model)
    cls = type(model[1])
    convert(model)
    assert isinstance(model[1], triton_bn.BatchNorm2d)
    assert_same(original, model, images())
    revert(copied := copy.deepcopy(model))
    assert type(copied[1]).__bases__ == cls.__bases__ == (nn.BatchNorm2d,)
    assert_same(original, copied, images())
    parametrize.remove_parametrizations(model[1], "weight")
    assert type(model[1]) is triton_bn.BatchNorm2d
    revert(model)
    assert type(model[1]) is nn.BatchNorm2d


class Named(nn.BatchNorm2d):
    def double_eps(self) -> float:
        return 2 * self.eps


class Frozen(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return input * self.weight.view(1, -1, 1, 1)


def test_a_subclass_is_replaced_where_it_is_the_same_layer() -> None:
    model = randomize(nn.Sequential(Named(3), nn.ReLU(), Frozen(3), nn.ReLU()))
    original = copy.deepcopy(model)
    convert(model)
    assert isinstance(model[0], Named)
    assert isinstance(model[0], triton_bn.BatchNorm2d)
    assert model[0].double_eps() == 2e-5
    assert type(model[2]) is Frozen
    assert fused(model) == ["relu", ""]
    assert conversion_report(model).left[0].note == "a Frozen has a forward of its own"
    again = pickle.loads(pickle.dumps(model))
    assert isinstance(again[0], Named)
    model[2].bias.requires_grad_(False)
    original[2].bias.requires_grad_(False)
    x = images()
    torch.testing.assert_close(model(x), original(x))
    torch.testing.assert_close(again(x), original(x))
    assert type(revert(model)[0]) is Named


def test_a_lazy_layer_becomes_ours_when_it_is_materialised() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls lazy modules experimental
        model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.LazyBatchNorm2d(), nn.ReLU()).double()
    original = nn.Sequential(model[0], nn.BatchNorm2d(3), nn.ReLU()).double()
    convert(model)
    assert fused(model) == [""]
    x = images()
    torch.testing.assert_close(model(x), original(x))
    assert type(model[1]) is triton_bn.BatchNorm2d
    original[0] = copy.deepcopy(model[0])
    assert fused(convert(model)) == ["relu"]
    assert_same(original, model, x)
    assert type(revert(model)[1]) is nn.BatchNorm2d


def test_sync_makes_every_layer_synchronized_and_keeps_groups() -> None:
    group, own = object(), object()
    model: Any = nn.Sequential(nn.BatchNorm2d(3), nn.SyncBatchNorm(3, process_group=own), nn.ReLU())
    model.append(triton_bn.BatchNorm2d(3, activation="relu"))
    convert(model, sync=True, process_group=group)
    assert [type(model[i]) for i in (0, 1, 3)] == [triton_bn.SyncBatchNorm] * 3
    assert [model[i].process_group for i in (0, 1, 3)] == [group, own, group]
    assert fused(model) == ["", "relu", ""]
    assert str(model[3].activation) == "relu"
    del model[3]
    revert(model)
    assert [type(m) for m in model] == [nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU]
    assert "process_group" not in vars(model[0])
    convert(model)
    assert [type(model[i]) for i in (0, 1)] == [triton_bn.BatchNorm2d, triton_bn.SyncBatchNorm]
    assert model[1].process_group is own


def test_without_fuse_layers_are_replaced_and_nothing_else() -> None:
    model = net()
    original = copy.deepcopy(model)
    convert(model, fuse=False)
    assert fused(model) == [""] * 6
    assert type(model.blocks[0]) is Block
    assert type(model.relu) is nn.ReLU
    assert_same(original, model, images())
    convert(model)
    assert fused(model) == ["relu", "relu", "add + relu", "relu", "", "add + relu"]
    assert_same(original, model, images())


# -------------------------------------------------------------------------------------- fusing


def unit(forward: Callable[..., Tensor], **children: nn.Module) -> nn.Module:
    """A module with conv, bn and a forward."""

    class Module(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            for name, child in children.items():
                self.add_module(name, child)

    Module.forward = forward  # type: ignore[method-assign]
    return randomize(Module())


# Not lambdas: what is converted is read from the source of a function.
def functional(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(self.conv(x)))


def functional_in_place(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(self.conv(x)), inplace=True)


def of_torch(self: Any, x: Tensor) -> Tensor:
    return torch.relu_(self.bn(self.conv(x)))


def method(self: Any, x: Tensor) -> Tensor:
    return self.bn(self.conv(x)).relu()


def method_in_place(self: Any, x: Tensor) -> Tensor:
    x = self.bn(self.conv(x))
    return x.sigmoid_()


def with_parameter(self: Any, x: Tensor) -> Tensor:
    return F.leaky_relu(self.bn(self.conv(x)), 0.3)


def clipped(self: Any, x: Tensor) -> Tensor:
    return F.hardtanh(self.bn(self.conv(x)), 0.0, 6.0)


def plus(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(self.conv(x)) + x)


def plus_reversed(self: Any, x: Tensor) -> Tensor:
    return F.silu(x + self.bn(self.conv(x)))


def plus_in_place(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    y += x
    return y


def plus_used_again(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x)) + x
    return F.relu(y) * y


def plus_argument(self: Any, x: Tensor, residual: Tensor) -> Tensor:
    return self.act(self.bn(self.conv(x)) + residual)


def two_branches(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(self.conv(x)) + self.other(x))


def residual_later(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    residual = self.other(x)
    y += residual
    return F.relu(y)


def residual_first(self: Any, x: Tensor) -> Tensor:
    y = self.other(x)
    z = self.bn(self.conv(x))
    z += y
    return F.relu(z)


def past_identities(self: Any, x: Tensor) -> Tensor:
    y = self.nothing(self.bn(self.conv(x)))
    return self.act(self.nothing2(y + self.nothing3(x)))


def by_mode(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    if self.training:  # noqa: SIM108
        y = F.relu(y)
    else:
        y = F.silu(y)
    return y


def by_type(self: Any, x: Tensor) -> Tensor:
    if isinstance(x, list):
        x = x[0]
    return F.relu(self.bn(self.conv(x)))


def by_presence(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    x = F.relu(self.bn(self.conv(x)))
    return x if mask is None else x * mask


def called_twice(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(self.bn(self.conv(x))))


def added_twice(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(self.conv(x)) + x + x)


def random_constant(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(self.conv(x))) * torch.ones(3, 1, 1, dtype=torch.float64)


def chosen(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x)) if self.flag else self.bn(x)
    return F.relu(y)


def in_one_branch(self: Any, x: Tensor) -> Tensor:
    if self.flag:  # noqa: SIM108
        y = self.bn(self.conv(x))
    else:
        y = self.conv(x)
    return self.act(y)


def in_a_loop(self: Any, x: Tensor) -> Tensor:
    for _ in range(3):
        y = self.bn(self.conv(x))
        x = F.relu(y)
    return x


def under_a_context(self: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = F.relu(self.bn(self.conv(x)))
    return x


def with_other_names(self: Any, x: Tensor) -> Tensor:
    a = self.conv(x)
    b: Tensor = self.bn(a)
    c = F.relu(b)
    return c


def mode_as_argument(self: Any, x: Tensor) -> Tensor:
    x = F.relu(self.bn(self.conv(x)))
    return F.dropout(x, 0.5, training=self.training)


def mutates_elsewhere(self: Any, x: Tensor) -> Tensor:
    y = x * 2
    z = y
    y += 1
    return F.relu(self.bn(self.conv(x)) + z)


def downsample() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))


IDENTITIES = {f"nothing{i}": nn.Identity() for i in ("", 2, 3)}


@pytest.mark.parametrize(
    ("forward", "children", "expected"),
    [
        (functional, {}, ["relu"]),
        (functional_in_place, {}, ["relu"]),
        (of_torch, {}, ["relu"]),
        (method, {}, ["relu"]),
        (method_in_place, {}, ["sigmoid"]),
        (with_parameter, {}, ["leaky_relu(0.3)"]),
        (clipped, {}, ["relu6"]),
        (plus, {}, ["add + relu"]),
        (plus_reversed, {}, ["add + silu"]),
        (plus_in_place, {}, ["add"]),
        (plus_argument, {"act": nn.LeakyReLU(0.3)}, ["add + leaky_relu(0.3)"]),
        (plus_used_again, {}, ["add"]),
        # Nothing is computed later than it was: so the layer that comes last takes the add up.
        (two_branches, {"other": downsample()}, ["", "add + relu"]),
        (residual_later, {"other": downsample()}, ["", "add + relu"]),
        (
            residual_later,
            {"other": nn.Sequential()},
            ["add + relu"],
        ),  # an empty shortcut computes nothing
        (residual_first, {"other": nn.Conv2d(3, 3, 1)}, ["add + relu"]),
        (past_identities, {**IDENTITIES, "act": nn.ReLU()}, ["add + relu"]),
        (by_mode, {}, ["relu | silu"]),
        (by_type, {}, ["relu"]),
        (by_presence, {}, ["relu"]),
        (called_twice, {}, ["relu"]),
        (added_twice, {}, ["add"]),
        (random_constant, {}, ["relu"]),
        (chosen, {}, ["relu"]),
        (in_one_branch, {"act": nn.GELU()}, ["gelu"]),
        (in_a_loop, {}, ["relu"]),
        (under_a_context, {}, ["relu"]),
        (with_other_names, {}, ["relu"]),
        (mode_as_argument, {}, ["relu"]),
        (mutates_elsewhere, {}, ["add + relu"]),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_follows_a_layer_is_taken_up(
    forward: Callable[..., Tensor],
    children: dict[str, nn.Module],
    expected: list[str],
    computed: list[str],
) -> None:
    required = forward.__code__.co_argcount - 1 - len(forward.__defaults__ or ())
    inputs = [images() for _ in range(required)]
    model = unit(forward, **copy.deepcopy(children))
    model.flag = True
    original = copy.deepcopy(model)
    convert(model)
    assert fused(model) == expected, notes(model)
    assert_same(original, model, *inputs)
    labels = {label for row in expected for label in row.split(" | ")}
    assert set(filter(None, computed)) == set(filter(None, labels))
    assert_same(original, revert(model), *inputs)


@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU(), "relu"),
        (nn.ReLU(inplace=True), "relu"),
        (nn.ReLU6(), "relu6"),
        (nn.Hardtanh(0, 6), "relu6"),
        (nn.LeakyReLU(0.2), "leaky_relu(0.2)"),
        (nn.SiLU(), "silu"),
        (nn.Hardswish(), "hardswish"),
        (nn.GELU(), "gelu"),
        (nn.ELU(0.5), "elu(0.5)"),
        (nn.Mish(), "mish"),
        (nn.Sigmoid(), "sigmoid"),
        (nn.Tanh(), "tanh"),
    ],
    ids=str,
)
def test_every_activation_of_a_sequence_is_fused(
    activation: nn.Module, name: str, computed: list[str]
) -> None:
    layers = (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), activation, nn.Conv2d(3, 3, 1))
    model = randomize(nn.Sequential(*layers))
    original = copy.deepcopy(model)
    keys = list(model.state_dict())
    convert(model)
    assert fused(model) == [name]
    assert model[2] is activation
    assert model[1].activation is None
    assert list(model.state_dict()) == keys
    assert_same(original, model, images())
    assert computed == [name, name]
    assert_same(original[:3], model[:3], images())
    assert type(revert(model)) is nn.Sequential
    assert_same(original, model, images())


NOT_ALONE = "no add or activation alone takes its output at once"


def used_twice(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    return F.relu(y) + y


def scaled_add(self: Any, x: Tensor) -> Tensor:
    return torch.add(self.bn(self.conv(x)), x, alpha=2)


def number_added(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(self.conv(x)) + x.size(0))


def added_to_itself(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    return y + y


def other_gelu(self: Any, x: Tensor) -> Tensor:
    return F.gelu(self.bn(self.conv(x)), approximate="tanh")


def other_bounds(self: Any, x: Tensor) -> Tensor:
    return F.hardtanh(self.bn(self.conv(x)))


def other_order(self: Any, x: Tensor) -> Tensor:
    return self.bn(F.relu(self.conv(x)))


def between(self: Any, x: Tensor) -> Tensor:
    return F.relu(self.bn(self.conv(x)) * 2)


def into_another(self: Any, x: Tensor) -> Tensor:
    y = x * 2
    z = y
    y += self.bn(self.conv(x))
    return y * z


def something_between(self: Any, x: Tensor) -> Tensor:
    y = self.bn(x * 2)
    return y + self.conv(x)


def input_changed(self: Any, x: Tensor) -> Tensor:
    z = self.conv(x)
    y = self.bn(z)
    z.data.zero_()
    return F.relu(y)


def read_again(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    z = F.relu(y)
    return z * y


def read_again_in_a_loop(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    for _ in range(2):
        x = x + F.relu(y)
    return x


def read_by_a_function(self: Any, x: Tensor) -> Tensor:
    read = lambda: y * 2  # noqa: E731
    y = self.bn(self.conv(x))
    z = F.relu(y)
    return z * read()


def not_everywhere(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    total = sum(p.sum() for p in self.parameters())
    y = self.bn(self.conv(x))
    return F.relu(y) if self.conv.stride == (2, 2) else x * total


def read_in_the_next_round(self: Any, x: Tensor) -> Tensor:
    y = z = x
    for _ in range(2):
        x = z + y
        y = self.bn(self.conv(x))
        z = F.relu(y)
    return z


def never_read(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    y = x * 2
    return y * sum(p.sum() for p in self.parameters())


def in_a_try(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    try:
        y = F.relu(y)
    finally:
        x = y
    return x


def suppressed(self: Any, x: Tensor) -> Tensor:
    with contextlib.suppress(ZeroDivisionError):
        y = self.bn(self.conv(x))
        y = F.relu(y) * (1 // 0 if self.flag else 1)
    return y


def by_a_list(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    return [F.relu(y), y][1]


def asked_for(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    locals()
    return F.relu(y)


def activate(x: Tensor) -> Tensor:
    return F.relu(x)


def by_a_function(self: Any, x: Tensor) -> Tensor:
    return activate(self.bn(self.conv(x)))


def leaves_something(self: Any, x: Tensor) -> Tensor:
    self.last = self.bn(self.conv(x))
    return F.relu(self.last)


def by_value(self: Any, x: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    return F.relu(y) if y.sum() > 1e9 else y


@pytest.mark.parametrize(
    ("forward", "note"),
    [
        (used_twice, NOT_ALONE),
        (scaled_add, "followed by add"),
        (number_added, NOT_ALONE),
        (added_to_itself, NOT_ALONE),
        (other_gelu, "followed by gelu"),
        (other_bounds, "followed by hardtanh"),
        (other_order, "Module returns it"),
        (between, NOT_ALONE),
        (into_another, NOT_ALONE),
        (something_between, NOT_ALONE),
        (input_changed, NOT_ALONE),
        (read_again, NOT_ALONE),
        (read_again_in_a_loop, NOT_ALONE),
        (read_by_a_function, NOT_ALONE),
        (read_in_the_next_round, NOT_ALONE),
        (not_everywhere, NOT_ALONE),
        (never_read, NOT_ALONE),
        (in_a_try, NOT_ALONE),
        (suppressed, NOT_ALONE),
        (by_a_list, NOT_ALONE),
        (asked_for, "Module.forward asks for `locals`"),
        (by_a_function, "followed by activate"),
        (leaves_something, NOT_ALONE),
        (by_value, NOT_ALONE),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_may_not_be_the_same_stays_as_it_is(
    forward: Callable[..., Tensor], note: str, computed: list[str]
) -> None:
    model = unit(forward)
    model.flag = True
    original = copy.deepcopy(model)
    before = set(vars(model))
    convert(model)
    assert fused(model) == [""]
    assert notes(model) == [note]
    assert set(vars(model)) - before == {"_conversion_report"}
    assert_same(original, model, images())
    assert not any(computed)
    if forward not in (
        asked_for,
        leaves_something,
    ):  # nor where the class is edited for another module's sake
        edited: Any = convert(copy.deepcopy(original), fuse=False)
        roles = (("F.relu", "activates"), ("self.bn", "opens"))
        edited.__class__ = rewrite.rewritten(type(edited), (("forward", roles),))
        assert_same(original, edited, images())


@pytest.mark.parametrize(
    "activation", [nn.PReLU(), nn.Hardtanh(), nn.GELU("tanh"), nn.Softplus()], ids=str
)
def test_other_activations_stay(activation: nn.Module) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), activation))
    convert(model)
    assert fused(model) == [""]
    assert model[2] is activation


@pytest.mark.parametrize("which", [1, 2], ids=["layer", "activation"])
@pytest.mark.parametrize(
    "kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"]
)
def test_what_somebody_looks_at_stays(which: int, kind: str, computed: list[str]) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()))
    handle = getattr(model[which], f"register_{kind}")(lambda *_: None)
    x = images()
    assert fused(convert(model)) == [""]
    assert "hooks" in notes(model)[0]
    model(x)
    handle.remove()
    assert computed in ([], [""])
    model(x)
    assert computed[-1] == "relu"
    assert fused(convert(model)) == ["relu"]


# ------------------------------------------------------------------- what a fused model still does


def test_a_fused_model_is_what_it_was() -> None:
    model = net()
    original = copy.deepcopy(model)
    convert(model)
    assert isinstance(model, Net)
    assert isinstance(model.blocks[1], Block)
    assert type(model.blocks[1]).__qualname__ == "Block"
    assert conversion_report(model).rewritten == ("", "blocks.0", "blocks.1", "blocks.1.down")
    assert repr(model).replace("triton_bn.", "") == repr(original)
    assert list(model.state_dict()) == list(original.state_dict())
    assert [n for n, _ in model.named_modules()] == [n for n, _ in original.named_modules()]
    seen: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert_same(original, model, images())
    assert len(seen) == 2
    torch.testing.assert_close(model.blocks[0](seen[0]), original.blocks[0](seen[0]))


def saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    again: nn.Module = torch.load(file, weights_only=False)
    return again


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model)), saved],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_copies_are_fused_and_revert_by_themselves(copied: Callable[[Any], Any]) -> None:
    original = net()
    model = convert(copy.deepcopy(original))
    again: Any = copied(model)
    assert fused(again) == fused(model)
    if copied is not copy.copy:
        with torch.no_grad():  # bound to itself, not to the model it was copied from
            for parameter in model.parameters():
                parameter.zero_()
    assert_same(original, again, images())
    assert type(again.blocks[0]) is type(model.blocks[0])
    revert(again)
    assert type(again.blocks[0]) is Block
    assert type(again.relu) is nn.ReLU
    assert_same(original, again, images())


def test_checkpoints_load_both_ways() -> None:
    original, model = net(), convert(net())
    for source, target in ((original, model), (model, original)):
        for parameter in source.parameters():
            parameter.data.normal_()
        target.load_state_dict(source.state_dict())
        assert_same(source, target, images())


def test_a_fused_model_traces_and_compiles() -> None:
    original = net()
    model = convert(copy.deepcopy(original))
    x = images()

    class Tracer(torch.fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return isinstance(m, nn.modules.batchnorm._BatchNorm) or super().is_leaf_module(m, "")

    traced = torch.fx.GraphModule(model, Tracer().trace(model))
    torch.testing.assert_close(traced(x), original(x))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), original(x))


def test_the_mode_is_read_when_a_rewritten_forward_runs() -> None:
    model = convert(unit(mode_as_argument))
    x = images()
    model.eval()
    assert torch.equal(model(x), model(x))
    model.train()
    assert (model(x) == 0).sum() > (model.eval()(x) == 0).sum()


class Inverted(nn.Module):
    """MobileNet's block: the add is outside of the sequence that ends with the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Hardswish(True)),
            nn.Sequential(nn.Conv2d(6, 3, 1), nn.BatchNorm2d(3)),
        )
        self.skip = True

    def forward(self, input: Tensor) -> Tensor:
        result = self.block(input)
        if self.skip:
            result += input
        return result


def test_a_residual_is_passed_through_sequences() -> None:
    model: Any = randomize(Inverted())
    original = copy.deepcopy(model)
    convert(model)
    assert fused(model) == ["hardswish", "add"]
    assert isinstance(model.block, nn.Sequential)
    assert_same(original, model, images())
    assert_same(original.block, model.block, images())
    assert_same(original.block[:1], model.block[:1], images())
    assert_same(original, pickle.loads(pickle.dumps(model)), images())
    revert(model)
    assert type(model.block) is type(model.block[1]) is nn.Sequential


class Shortcut(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class Nested(nn.Module):
    """The two ends of the add are in modules of their own, as in transformers' ResNet."""

    def __init__(self, plain: bool) -> None:
        super().__init__()
        self.shortcut = nn.Identity() if plain else Shortcut()
        self.layer = nn.Sequential(Shortcut(), Shortcut())
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        residual = x
        x = self.layer(x)
        residual = self.shortcut(residual)
        x += residual
        return self.act(x)


@pytest.mark.parametrize("plain", [True, False])
def test_a_residual_is_passed_through_modules(plain: bool, computed: list[str]) -> None:
    model = randomize(Nested(plain))
    original = copy.deepcopy(model)
    convert(model)
    assert sorted(fused(model)) == (["", "add + relu"] if plain else ["", "", "add + relu"])
    assert_same(original, model, images())
    assert computed.count("add + relu") == 2
    assert_same(original, pickle.loads(pickle.dumps(model)), images())


class Tapped(nn.Module):
    """Walks over its sequence by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3), nn.Mish()
        )

    def forward(self, x: Tensor) -> Tensor:
        taps = []
        for i, layer in enumerate(self.features):
            x = layer(x)
            if i == 3:
                taps.append(x)
        return torch.cat([*taps, x], 1)


def test_a_sequence_that_is_walked_over_shows_what_it_showed() -> None:
    model = randomize(Tapped())
    original = copy.deepcopy(model)
    convert(model)
    assert fused(model) == ["", ""]
    assert_same(original, model, images())


def test_a_graph_module_keeps_its_graph() -> None:
    original = torch.fx.symbolic_trace(net())
    model = convert(copy.deepcopy(original))
    assert not any(fused(model))
    assert "pickles" in notes(model)[0]
    assert_same(original, copy.deepcopy(model), images())


def test_one_activation_in_many_places_of_sequences() -> None:
    relu, convs = nn.ReLU(), [nn.Conv2d(3, 3, 1) for _ in range(2)]
    norms = [nn.BatchNorm2d(3) for _ in range(2)]
    model: Any = randomize(nn.Sequential(convs[0], norms[0], relu, convs[1], relu, norms[1], relu))
    original = copy.deepcopy(model)
    convert(model)
    assert fused(model) == ["relu", "relu"]
    assert model[4] is relu
    assert_same(original, model, images())
    revert(model)
    assert model[2] is model[4] is model[6] is relu


def test_an_add_keeps_what_broadcasting_and_promotion_do() -> None:
    out, into = unit(plus_outer, second=nn.Identity()), unit(plus_inner, second=nn.Identity())
    for module in (out, into):
        original = copy.deepcopy(module).float()
        model = convert(copy.deepcopy(module).float())
        assert fused(model) == ["add + relu"]
        x = torch.randn(2, 3, 4, 4)
        for other in (x.double(), x[:, :, :1], x[:1, :1], x.half(), torch.randn(5, 2, 3, 4, 4)):
            if module is into and other.dim() == 5:
                for m in (original, model):
                    with pytest.raises(RuntimeError, match="doesn't match the broadcast shape"):
                        m(x, other)
                continue
            expected, actual = original(x, other), model(x, other)
            assert actual.dtype == expected.dtype
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def plus_outer(self: Any, x: Tensor, other: Tensor) -> Tensor:
    return F.relu(self.bn(self.conv(x)) + self.second(other))


def plus_inner(self: Any, x: Tensor, other: Tensor) -> Tensor:
    y = self.bn(self.conv(x))
    y += self.second(other)
    return F.relu(y)


@pytest.mark.parametrize("make", [Inverted, lambda: Nested(True), Block])
def test_an_add_in_place_keeps_its_dtype_under_autocast(make: Callable[[], nn.Module]) -> None:
    original = randomize(make()).float()
    model = convert(copy.deepcopy(original))
    assert any("add" in text for text in fused(model))
    x = torch.randn(2, 4 if make is Block else 3, 5, 5)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = original(x), model(x)
    assert actual.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


def left_in_place(self: Any, x: Tensor, y: Tensor) -> Tensor:
    x = self.layer(x)
    x += self.other(y)
    return x


def test_an_add_in_place_keeps_the_dtype_of_its_left_side() -> None:
    original = unit(left_in_place, layer=downsample(), other=downsample())
    original.layer.float()
    model = convert(copy.deepcopy(original))
    assert fused(model) == ["", "", "add"]
    x = images()
    assert model(x.float(), x).dtype == original(x.float(), x).dtype == torch.float32


class Reaching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[2](self.layers(x) - 1)


def test_an_activation_that_is_also_called_from_outside_does_what_it_did() -> None:
    model = randomize(Reaching())
    original = copy.deepcopy(model)
    assert fused(convert(model)) == ["relu"]
    assert_same(original, model, images())


# -------------------------------------------------------------------------- reverting, and refusing


def test_revert_restores_every_object() -> None:
    model = net()
    before = {name: (type(m), dict(vars(m)), dict(m._modules)) for name, m in model.named_modules()}
    order = {name: list(m._modules) for name, m in model.named_modules()}
    revert(convert(model))
    assert {name: list(m._modules) for name, m in model.named_modules()} == order
    for name, module in model.named_modules():
        cls, attributes, children = before[name]
        assert type(module) is cls
        assert vars(module).keys() == attributes.keys()
        assert all(module._modules[key] is child for key, child in children.items())
    with pytest.raises(ValueError, match="not converted"):
        conversion_report(model)


def test_the_mode_goes_along() -> None:
    model = net().eval()
    for change in (convert, nn.Module.train, revert):
        change(model)
        assert {module.training for module in model.modules()} == {change is not convert}


def test_a_layer_with_a_forward_of_its_own_is_left() -> None:
    model: Any = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    model[0].forward = lambda x: x * 2
    convert(model)
    assert conversion_report(model).left[0].note == "its forward was replaced on the instance"
    assert torch.equal(model(-torch.ones(1, 3, 1, 1)), torch.zeros(1, 3, 1, 1))


def test_revert_makes_layers_stock_that_were_built_as_ours() -> None:
    model = nn.Sequential(triton_bn.BatchNorm1d(3), triton_bn.BatchNorm1d(3, activation="relu"))
    with pytest.raises(ValueError, match="no layer for '1'"):
        revert(model)
    assert type(model[0]) is triton_bn.BatchNorm1d
    assert [type(m) for m in revert(model[:1])] == [nn.BatchNorm1d]


def test_layers_built_as_ours_fuse_as_stock_ones_do(computed: list[str]) -> None:
    """But for those that were built with an activation, behind which another one stays."""
    model: Any = nn.Sequential(nn.Conv2d(3, 3, 1), triton_bn.BatchNorm2d(3), nn.ReLU())
    model.append(triton_bn.BatchNorm2d(3, activation="silu")).append(nn.ReLU())
    original = copy.deepcopy(randomize(model))
    convert(model)
    assert fused(model) == ["relu", ""]
    assert conversion_report(model).replaced == ()
    assert str(model[3].activation) == "silu"
    assert_same(original, model, images())
    assert computed == ["relu", "relu"]


def test_converting_twice_changes_nothing() -> None:
    original = net()
    model = convert(convert(copy.deepcopy(original)))
    assert conversion_report(model).replaced == ()
    assert fused(model) == fused(convert(copy.deepcopy(original)))
    assert_same(original, model, images())
    assert_same(original, revert(model), images())
    assert [type(m) for m in model.modules()] == [type(m) for m in original.modules()]


def test_what_cannot_be_converted_is_refused() -> None:
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, but got list"):
        convert([nn.BatchNorm2d(3)])  # type: ignore[type-var]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        scripted = torch.jit.script(nn.Sequential(nn.BatchNorm2d(3)))
    with pytest.raises(ValueError, match="scripted"):
        convert(scripted)
    model = nn.Sequential(nn.BatchNorm2d(3), scripted)
    convert(model)
    assert model[1] is scripted
    compiled = nn.Sequential(nn.BatchNorm2d(3))
    compiled.compile(backend="eager")
    with pytest.raises(ValueError, match=r"before torch\.compile: its '1'"):
        convert(nn.Sequential(nn.BatchNorm2d(3), compiled))
    assert type(compiled[0]) is nn.BatchNorm2d
    with pytest.raises(ValueError, match=r"before torch\.compile: it is"):
        convert(torch.compile(nn.Sequential(nn.BatchNorm2d(3)), backend="eager"))


@pytest.mark.parametrize("at", range(0, 17, 4))
def test_a_change_that_fails_takes_all_others_back(
    at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = net()
    before = {name: (type(m), dict(vars(m)), dict(m._modules)) for name, m in model.named_modules()}
    module: Any = replace
    real, count = module._set, itertools.count()

    def failing(*arguments: Any) -> None:
        real(*arguments)
        if next(count) == at:
            raise MemoryError

    monkeypatch.setattr(module, "_set", failing)
    with pytest.raises(MemoryError):
        convert(model)
    for name, m in model.named_modules():
        cls, attributes, children = before[name]
        assert type(m) is cls
        assert vars(m) == attributes
        assert m._modules == children


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone.

    It ends after the test, whose models are gone by then: a DistributedDataParallel that outlives its group
    ends it with the GIL held, for which a thread of the group may be waiting.
    """
    distributed = torch.distributed
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", [nn.DataParallel, nn.parallel.DistributedDataParallel])
@pytest.mark.parametrize("first", [True, False], ids=["converted first", "wrapped first"])
def test_wrapped_models_are_converted_inside(wrap: type[nn.Module], first: bool) -> None:
    original = net()
    model = copy.deepcopy(original)
    model = wrap(convert(model)) if first else convert(wrap(model))
    assert fused(model.module if first else model) == [
        "relu", "relu", "add + relu", "relu", "", "add + relu",
    ]  # fmt: skip
    assert_same(original, model.module, images())
    x = images()
    for m in (original, model):
        m.zero_grad()
        m(x).square().sum().backward()
    for a, b in zip(original.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------------------------------- report


def test_the_report_is_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    model = convert(net(), verbose=True)
    printed = capsys.readouterr().out
    assert printed == f"{conversion_report(model)}\n"
    lines = printed.splitlines()
    assert lines[0].split() == ["layer", "was", "is", "fused", "with", "note"]
    assert lines[4].split() == [
        "blocks.0.bn2", "BatchNorm2d", "triton_bn.BatchNorm2d", "add", "+", "relu",
    ]  # fmt: skip
    assert lines[-4].endswith(NOT_ALONE)
    assert lines[-2] == "6 layers: 6 replaced, 5 fused, 0 left"
    assert lines[-1] == "they are fused by: (model), blocks.0, blocks.1, blocks.1.down"
    assert "(model)" in str(conversion_report(convert(nn.BatchNorm2d(3))))
    assert str(conversion_report(convert(nn.ReLU()))).endswith("0 replaced, 0 fused, 0 left")
