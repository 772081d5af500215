"""The layers beside their twins of torch.nn: what a model that holds them would notice."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import Path
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import triton_bn
from triton_bn import Activation

path = oracle.path

#: A layer, its twin, and an input of 3 channels.
PAIRS = [
    (triton_bn.BatchNorm1d, nn.BatchNorm1d, (7, 3)),
    (triton_bn.BatchNorm1d, nn.BatchNorm1d, (4, 3, 5)),
    (triton_bn.BatchNorm2d, nn.BatchNorm2d, (4, 3, 5, 2)),
    (triton_bn.BatchNorm3d, nn.BatchNorm3d, (2, 3, 3, 2, 4)),
]
EACH_PAIR = pytest.mark.parametrize(
    ("ours", "twin", "shape"), PAIRS, ids=["1d (N, C)", "1d (N, C, L)", "2d", "3d"]
)
EACH_CLASS = pytest.mark.parametrize(
    ("ours", "twin"), [pair[:2] for pair in PAIRS[1:]], ids=["1d", "2d", "3d"]
)

#: Constructor arguments after num_features.
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "eps": {"eps": 0.1},
    "momentum": {"momentum": 0.7},
    "cumulative": {"momentum": None},
    "no parameters": {"affine": False},
    "no bias": {"bias": False},
    "no statistics": {"track_running_stats": False},
    "neither": {"affine": False, "track_running_stats": False},
    "cumulative without parameters": {"affine": False, "momentum": None},
}
EACH_OPTIONS = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def build(kind: type[nn.Module], device: torch.device, seed: int = 0, **options: Any) -> Any:
    """A layer of 3 channels in float64 with parameters of its own."""
    if kind.__module__.startswith("torch") and not has_bias() and "bias" in options:
        pytest.skip("this PyTorch has no bias=")
    layer = kind(3, device=device, dtype=torch.float64, **options)
    with torch.no_grad():
        for i, parameter in enumerate(layer.parameters()):
            parameter.copy_(randn(3, seed=seed + i) + 0.5)
    return layer


def has_bias() -> bool:
    return "bias" in inspect.signature(nn.BatchNorm2d.__init__).parameters


def assert_same_state(ours: nn.Module, twin: nn.Module) -> None:
    mine, theirs = ours.state_dict(), twin.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-12, atol=1e-12, msg=name)


def assert_same_step(ours: nn.Module, twin: nn.Module, x: Tensor, dy: Tensor) -> None:
    """The same output, gradients and state."""
    mine, theirs = ([x.clone().requires_grad_(), *layer.parameters()] for layer in (ours, twin))
    got, want = ours(mine[0]), twin(theirs[0])
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(got, mine, dy)
    want = torch.autograd.grad(want, theirs, dy)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert_same_state(ours, twin)


@pytest.mark.parametrize(
    ("pair", "options"),
    [(pair, {}) for pair in PAIRS] + [(PAIRS[0], options) for options in OPTIONS.values()],
    ids=["1d (N, C)", "1d (N, C, L)", "2d", "3d", *OPTIONS],
)
def test_a_layer_does_what_its_twin_does(
    path: Path, pair: tuple[type, type, tuple[int, ...]], options: dict[str, Any]
) -> None:
    """Over batches in training, in eval, and in training again."""
    ours, twin, shape = pair
    layer, other = build(ours, path.device, **options), build(twin, path.device, **options)
    for step, training in enumerate((True, True, False, True)):
        layer.train(training)
        other.train(training)
        x = randn(*shape, seed=10 + step).mul(1 + step).add(step).to(path.device)
        assert_same_step(layer, other, x, randn(*shape, seed=20 + step).to(path.device))


def change(layer: Any, **attributes: Any) -> None:
    for name, value in attributes.items():
        setattr(layer, name, value)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize(
    "attributes",
    [
        {"track_running_stats": False},
        {"num_batches_tracked": None},
        {"num_batches_tracked": None, "momentum": None},
        {"running_mean": None, "running_var": None},
        {"momentum": 0.0},
        {"eps": 0.25},
        {"weight": None},
        {"bias": None},
    ],
    ids=str,
)
def test_attributes_changed_later_mean_what_they_mean_to_the_twin(
    path: Path, attributes: dict[str, Any], training: bool
) -> None:
    layer, other = build(triton_bn.BatchNorm2d, path.device), build(nn.BatchNorm2d, path.device)
    for each in (layer, other):
        change(each, **attributes)
        each.train(training)
    for step in range(2):
        x = randn(4, 3, 2, 5, seed=step).to(path.device)
        assert_same_step(layer, other, x, randn(4, 3, 2, 5, seed=9).to(path.device))


def test_without_momentum_the_statistics_are_the_average_of_all_batches(path: Path) -> None:
    layer = triton_bn.BatchNorm1d(3, momentum=None, device=path.device)
    batches = [randn(6, 3, seed=s, dtype=torch.float32).to(path.device) * (s + 1) for s in range(5)]
    for n, x in enumerate(batches, 1):
        layer(x)
        seen = batches[:n]
        mean = torch.stack([b.double().mean(0) for b in seen]).mean(0)
        var = torch.stack([b.double().var(0) for b in seen]).mean(0)
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer.running_var.double(), var, rtol=1e-6, atol=1e-6)
        assert layer.num_batches_tracked == n
    layer.reset_running_stats()
    layer(batches[0])
    torch.testing.assert_close(layer.running_mean, batches[0].mean(0))


def test_without_momentum_the_counter_is_not_read_on_the_host(path: Path) -> None:
    """PyTorch's layer does, and so waits for the GPU in every step."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.count += function is torch.ops.aten._local_scalar_dense.default
            return function(*args, **(kwargs or {}))

    reads = {}
    for kind in (triton_bn.BatchNorm1d, nn.BatchNorm1d):
        layer = kind(3, momentum=None, device=path.device)
        x = randn(6, 3, dtype=torch.float32).to(path.device)
        with Reads() as mode:
            layer(x)
        reads[kind] = mode.count
    assert reads == {triton_bn.BatchNorm1d: 0, nn.BatchNorm1d: 1}


@pytest.mark.gpu
def test_a_training_step_never_waits_for_the_gpu(path: Path) -> None:
    layer = triton_bn.BatchNorm2d(3, momentum=None, activation="relu", device=path.device)
    x = torch.randn(4, 3, 8, 8, device=path.device, requires_grad=True)
    layer(x).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


# Activation and residual.


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@EACH_PAIR
def test_activation_and_residual_come_behind_the_twin(
    path: Path, ours: type, twin: type, shape: tuple[int, ...], training: bool
) -> None:
    for name in ("relu", Activation("leaky_relu", 0.2), "silu"):
        layer, other = build(ours, path.device, activation=name), build(twin, path.device)
        x, residual, dy = (randn(*shape, seed=s).to(path.device) for s in range(3))
        mine, theirs = ([t.clone().requires_grad_() for t in (x, residual)] for _ in range(2))
        for each in (layer, other):
            each.train(training)
        got = layer(*mine)
        want = oracle.activate(other(theirs[0]) + theirs[1], Activation.of(name))
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
        got = torch.autograd.grad(got, [*mine, *layer.parameters()], dy)
        want = torch.autograd.grad(want, [*theirs, *other.parameters()], dy)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        assert_same_state(layer, other)


def test_a_residual_may_come_by_name_and_without_an_activation(path: Path) -> None:
    layer = build(triton_bn.BatchNorm1d, path.device)
    x, residual = (randn(5, 3, seed=s).to(path.device) for s in range(2))
    want = build(nn.BatchNorm1d, path.device)(x) + residual
    torch.testing.assert_close(layer(x, residual=residual), want, rtol=1e-12, atol=1e-12)


def test_the_activation_is_an_attribute_of_the_layer() -> None:
    assert triton_bn.BatchNorm2d(3).activation is None
    assert triton_bn.BatchNorm2d(3, activation="gelu").activation == Activation("gelu")
    leaky = Activation("leaky_relu", 0.3)
    assert triton_bn.BatchNorm2d(3, activation=leaky).activation == leaky
    with pytest.raises(ValueError, match="'relu', 'relu6'"):
        triton_bn.BatchNorm2d(3, activation="swish")


# The contract with torch.nn.


@EACH_CLASS
def test_the_constructor_takes_what_the_twins_takes_and_an_activation(
    ours: type, twin: type
) -> None:
    mine = dict(inspect.signature(ours.__init__).parameters)
    theirs = inspect.signature(twin.__init__).parameters
    activation = mine.pop("activation")
    assert activation.kind is inspect.Parameter.KEYWORD_ONLY
    assert activation.default is None
    bias = mine["bias"] if has_bias() else mine.pop("bias")
    assert bias.kind is inspect.Parameter.KEYWORD_ONLY
    assert bias.default is True
    assert [(p.name, p.kind, p.default) for p in mine.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@EACH_CLASS
def test_forward_takes_an_input_and_a_residual(ours: type, twin: type) -> None:
    parameters = list(inspect.signature(ours.forward).parameters.values())
    assert [p.name for p in parameters] == ["self", "input", "residual", "mask"]
    assert parameters[2].default is parameters[3].default is None
    assert parameters[3].kind is inspect.Parameter.KEYWORD_ONLY


@EACH_CLASS
def test_a_layer_is_one_of_its_twins(ours: type, twin: type) -> None:
    layer = ours(3)
    assert isinstance(layer, twin)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert ours._version == twin._version
    assert ours.__name__ == twin.__name__


@EACH_CLASS
@EACH_OPTIONS
def test_a_layer_prints_as_its_twin_and_its_activation(
    ours: type, twin: type, options: dict[str, Any]
) -> None:
    if "bias" in options and not has_bias():
        pytest.skip("this PyTorch has no bias=")
    assert repr(ours(3, **options)) == f"triton_bn.{twin(3, **options)!r}"
    with_activation = ours(3, **options, activation=Activation("elu", 0.5))
    assert with_activation.extra_repr() == twin(3, **options).extra_repr() + ", activation=elu(0.5)"


@EACH_CLASS
@EACH_OPTIONS
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_parameters_and_buffers_are_made_as_the_twins(
    ours: type, twin: type, options: dict[str, Any], dtype: torch.dtype
) -> None:
    if "bias" in options and not has_bias():
        pytest.skip("this PyTorch has no bias=")
    for device in ("cpu", "meta"):
        layer, other = (kind(3, **options, device=device, dtype=dtype) for kind in (ours, twin))
        for tensors in (nn.Module.named_parameters, nn.Module.named_buffers):
            mine, theirs = dict(tensors(layer)), dict(tensors(other))
            assert mine.keys() == theirs.keys()
            for name, tensor in mine.items():
                assert (tensor.shape, tensor.dtype, tensor.device) == (
                    theirs[name].shape, theirs[name].dtype, theirs[name].device,
                )  # fmt: skip
                assert tensor.is_meta or torch.equal(tensor, theirs[name])


def test_a_layer_without_bias_works_where_pytorch_has_no_such_argument(path: Path) -> None:
    layer = build(triton_bn.BatchNorm1d, path.device, bias=False)
    assert layer.bias is None
    assert list(layer.state_dict()) == [
        "weight",
        "running_mean",
        "running_var",
        "num_batches_tracked",
    ]
    x = randn(5, 3).to(path.device)
    want = F.batch_norm(x, None, None, layer.weight, None, True)
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


# Saving, loading, copying.


@EACH_CLASS
@EACH_OPTIONS
def test_a_state_dict_goes_both_ways(
    ours: type, twin: type, options: dict[str, Any], device: torch.device
) -> None:
    sources = (
        build(ours, device, activation="relu", **options),
        build(twin, device, seed=5, **options),
    )
    for source in sources:
        if source.running_mean is not None:
            source.running_mean.copy_(randn(3, seed=7))
            source.running_var.copy_(randn(3, seed=8).square())
            source.num_batches_tracked.fill_(41)
    for source, kind in zip(sources, (twin, ours), strict=True):
        target = build(kind, device, seed=9, **options)
        assert str(target.load_state_dict(source.state_dict())) == "<All keys matched successfully>"
        assert_same_state(target, source)


def test_a_state_dict_from_before_the_counter_loads(device: torch.device) -> None:
    old = build(nn.BatchNorm2d, device).state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    layer = build(triton_bn.BatchNorm2d, device, seed=4)
    layer.load_state_dict(old)
    assert layer.num_batches_tracked == 0
    assert torch.equal(layer.weight, old["weight"])
    new = build(nn.BatchNorm2d, device).state_dict()
    del new["num_batches_tracked"]
    with pytest.raises(RuntimeError, match=r"Missing key.*num_batches_tracked"):
        layer.load_state_dict(new)


@pytest.mark.parametrize("way", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_a_copy_computes_the_same_and_is_its_own(path: Path, way: Callable[[Any], Any]) -> None:
    layer = build(
        triton_bn.BatchNorm2d, path.device, activation=Activation("leaky_relu", 0.2), momentum=None
    )
    x = randn(4, 3, 2, 5).to(path.device)
    layer(x)
    twin = way(layer)
    assert type(twin) is type(layer)
    assert repr(twin) == repr(layer)
    assert_same_state(twin, layer)
    before = copy.deepcopy(layer.state_dict())
    assert torch.equal(twin(x), layer(x))
    twin(x)
    assert twin.num_batches_tracked == 3
    assert layer.num_batches_tracked == before["num_batches_tracked"] + 1


# Dtypes, and calls beside one another.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_parameters_in_float32_stand_beside_16_bit_inputs(
    path: Path, dtype: torch.dtype, training: bool
) -> None:
    layer = triton_bn.BatchNorm2d(3, device=path.device).train(training)
    x = randn(4, 3, 5, 2, dtype=dtype).to(path.device).requires_grad_()
    y = layer(x)
    dx, dweight = torch.autograd.grad(y.float().square().sum(), [x, layer.weight])
    assert (y.dtype, dx.dtype, dweight.dtype) == (dtype, dtype, torch.float32)
    assert layer.running_mean.dtype == torch.float32
    half = layer.to(dtype)
    assert half.running_mean.dtype == dtype
    assert half(x).dtype == dtype


def test_calls_in_training_and_eval_before_one_backward(path: Path) -> None:
    layer, other = build(triton_bn.BatchNorm1d, path.device), build(nn.BatchNorm1d, path.device)
    x, dy = (randn(6, 3, 4, seed=s).to(path.device) for s in range(2))
    totals = []
    for each in (layer, other):
        leaf = x.clone().requires_grad_()
        outputs = [each(leaf), each(leaf * 2)]
        # PyTorch refuses backward once running statistics that eval has used moved on: its eval comes last.
        outputs.append(each.eval()(leaf))
        total = sum((n + 1) * (y * dy).sum() for n, y in enumerate(outputs))
        totals.append(torch.autograd.grad(total, [leaf, *each.parameters()]))
    for a, b in zip(*totals, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert_same_state(layer, other)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (2, 3, 0)])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_an_empty_batch_counts_as_it_counts_for_the_twin(
    path: Path, shape: tuple[int, ...], training: bool
) -> None:
    layer, other = (
        build(k, path.device).train(training) for k in (triton_bn.BatchNorm1d, nn.BatchNorm1d)
    )
    x = torch.empty(shape, dtype=torch.float64, device=path.device)
    assert_same_step(layer, other, x, x.clone())


# Errors.


@EACH_CLASS
def test_an_input_of_another_rank_is_refused_in_the_twins_words(ours: type, twin: type) -> None:
    for rank in range(7):
        x = torch.ones([2, 3, 2, 2, 2, 2, 2][:rank])
        messages = []
        for kind in (ours, twin):
            layer = kind(3)
            try:
                layer(x)
            except ValueError as error:
                messages.append(str(error))
            else:
                messages.append("accepted")
        assert messages[0] == messages[1]


@pytest.mark.parametrize(
    ("x", "change", "error"),
    [
        (torch.ones(1, 3), {}, ValueError),
        (torch.ones(4, 5), {}, RuntimeError),
        (torch.ones(4, 3).long(), {}, NotImplementedError),
        (torch.ones(4, 3), {"eps": 0.0}, ValueError),
        (torch.ones(4, 3).double(), {}, RuntimeError),
        (torch.ones(4, 3), {"running_var": None}, ValueError),
        (torch.ones(3), {}, ValueError),
    ],
    ids=["one value", "channels", "integers", "eps", "dtype", "one buffer", "rank"],
)
def test_nothing_changes_when_a_call_fails(
    path: Path, x: Tensor, change: dict[str, Any], error: type[Exception]
) -> None:
    layer, other = (k(3, device=path.device) for k in (triton_bn.BatchNorm1d, nn.BatchNorm1d))
    for each in (layer, other):
        for name, value in change.items():
            setattr(each, name, value)
        before = copy.deepcopy(each.state_dict())
        with pytest.raises(error):
            each(x.to(path.device))
        if each is layer:
            for name, tensor in layer.state_dict().items():
                assert torch.equal(tensor, before[name]), name
    assert not path.launches


@pytest.mark.parametrize("residual", [torch.ones(5, 3), torch.ones(4, 3, device="meta")])
def test_nothing_changes_when_a_residual_cannot_be_added(path: Path, residual: Tensor) -> None:
    layer = triton_bn.BatchNorm1d(3, device=path.device)
    if not residual.is_meta:
        residual = residual.to(path.device)
    with pytest.raises(RuntimeError):
        layer(torch.ones(4, 3, device=path.device), residual)
    assert layer.num_batches_tracked == 0
    assert (layer.running_mean == 0).all()


def test_eval_without_statistics_normalizes_by_the_batch_and_needs_two_values(path: Path) -> None:
    layer = triton_bn.BatchNorm1d(3, track_running_stats=False, device=path.device).eval()
    x = randn(6, 3, dtype=torch.float32).to(path.device)
    torch.testing.assert_close(layer(x), F.batch_norm(x, None, None, training=True))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(x[:1])


def test_a_counter_may_lie_elsewhere(path: Path) -> None:
    """An empty initialization leaves it on the meta device, say."""
    layer = triton_bn.BatchNorm1d(3, device=path.device)
    layer.num_batches_tracked = torch.tensor(0, device="meta")
    layer(randn(4, 3, dtype=torch.float32).to(path.device))
    assert layer.running_mean.any()


def test_nothing_warns(path: Path) -> None:
    layer = triton_bn.BatchNorm2d(3, activation="relu", momentum=None, device=path.device)
    # pyproject.toml has pytest raise every warning.
    layer(torch.randn(2, 3, 4, 4, device=path.device, requires_grad=True)).sum().backward()
    layer.eval()(torch.randn(2, 3, 4, 4, device=path.device))
