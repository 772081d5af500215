"""``batch_norm`` against float64, in plain torch and through the kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import hypothesis.strategies as st
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from oracle import Path
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.torch_version import TorchVersion

from triton_bn import Activation
from triton_bn.functional import batch_norm

path = oracle.path

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
EACH_DRIVER = pytest.mark.parametrize("driver", ["resident", "split", "streamed"])
MODES = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
ACTIVATIONS = (*oracle.ACTIVATIONS, Activation("leaky_relu", 1.5), Activation("elu", 0.5))
EACH_ACTIVATION = pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """The same on every device, and in every dtype but for its rounding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@dataclass
class Inputs:
    """The tensors of a call."""

    x: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    residual: Tensor | None = None
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    dy: Tensor | None = None

    @classmethod
    def of(
        cls,
        *shape: int,
        dtype: torch.dtype = torch.float32,
        parameters: torch.dtype | None = None,
        layout: str = "contiguous",
        residual: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> Inputs:
        """Random ones, with everything but the residual present unless asked for."""
        channels, parameters = shape[1], parameters or dtype
        inputs = cls(
            x=oracle.arrange(2 * randn(*shape, seed=seed, dtype=dtype) - 0.5, layout),
            weight=randn(channels, seed=seed + 1, dtype=parameters) + 0.5,
            bias=randn(channels, seed=seed + 2, dtype=parameters),
            residual=randn(*shape, seed=seed + 3, dtype=dtype) if residual else None,
            running_mean=randn(channels, seed=seed + 4, dtype=parameters),
            running_var=randn(channels, seed=seed + 5, dtype=parameters).square() + 0.25,
            dy=randn(*shape, seed=seed + 6, dtype=dtype),
        )
        return inputs.to(device)

    def to(self, device: torch.device | str) -> Inputs:
        """On another device, in the same layout."""
        if torch.device(device).type == "cpu":
            return self
        moved = {}
        for field in fields(self):
            tensor = getattr(self, field.name)
            if tensor is not None:
                storage = torch.empty(0, dtype=tensor.dtype, device=device)
                storage.set_(tensor.untyped_storage().to(device=device))
                tensor = storage.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
            moved[field.name] = tensor
        return Inputs(**moved)

    def statistics(self) -> list[Tensor]:
        return [t for t in (self.running_mean, self.running_var) if t is not None]


def layout(t: Tensor) -> list[int]:
    """The strides of the dimensions that have any."""
    return [stride for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]


def results(
    inputs: Inputs,
    training: bool,
    *,
    activation: str | Activation | None = None,
    momentum: float = 0.1,
    eps: float = 1e-5,
    needs: tuple[str, ...] = ("x", "weight", "bias", "residual"),
) -> dict[str, Tensor]:
    """What a call gives: y, the gradients of those in ``needs``, and in training the statistics after it.

    Its inputs are left alone.
    """
    leaves = {
        name: getattr(inputs, name).detach().requires_grad_()
        for name in needs
        if getattr(inputs, name) is not None
    }

    def leaf(name: str) -> Tensor | None:
        return leaves.get(name, getattr(inputs, name))

    after = [t.clone() for t in inputs.statistics()] or [None, None]
    y = batch_norm(
        leaf("x"), *after, leaf("weight"), leaf("bias"), training, momentum, eps,
        residual=leaf("residual"), activation=activation,
    )  # fmt: skip
    got = {"y": y.detach()}
    if leaves and inputs.dy is not None:
        gradients = torch.autograd.grad(y, list(leaves.values()), inputs.dy)
        got |= {f"d{name}": grad for name, grad in zip(leaves, gradients, strict=True)}
    if training and after[0] is not None:
        got |= {"running_mean": after[0], "running_var": after[1]}
    return got


def check(
    inputs: Inputs, training: bool, path: Path, *, rms: bool = True, **options: object
) -> dict[str, Tensor]:
    """A call's results, compared with the oracle's."""
    got = results(inputs, training, **options)
    options.pop("needs", None)
    want = oracle.batch_norm(
        inputs.x, inputs.running_mean, inputs.running_var, inputs.weight, inputs.bias, training,
        residual=inputs.residual, dy=inputs.dy, interpreted=path.interpreted, **options,
    )  # fmt: skip
    for name, tensor in got.items():
        source = getattr(inputs, "x" if name == "y" else name.removeprefix("d"))
        assert tensor.dtype == source.dtype, name
        want[name].assert_close(tensor, name, rms=rms)
    return got


# The question the project started from.


def test_rgb_batch_is_normalized_per_channel_over_batch_height_and_width(path: Path) -> None:
    x = torch.rand(32, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    gamma, beta = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([34.0, 35.0, 69.0])
    eps = 1e-5

    def beside(v: Tensor) -> Tensor:
        return v[None, :, None, None]

    pixels = [x[:, c].reshape(-1).double() for c in range(3)]
    mean = torch.stack([p.sum() / 512 for p in pixels])
    std = torch.stack([((p - p.sum() / 512).square().sum() / 512 + eps).sqrt() for p in pixels])
    by_hand = torch.stack([(x[:, c] - mean[c]) / std[c] * gamma[c] + beta[c] for c in range(3)], 1)
    # transforms.Normalize(mean, std), then γ and β.
    normalized = x.double().sub(beside(mean)).div(beside(std))
    transformed = normalized * beside(gamma) + beside(beta)
    layer = torch.nn.BatchNorm2d(3, eps=eps)
    with torch.no_grad():
        layer.weight.copy_(gamma)
        layer.bias.copy_(beta)
    ours = batch_norm(
        x.to(path.device), None, None, gamma.to(path.device), beta.to(path.device), True, eps=eps
    ).cpu()

    tolerance = {"rtol": 4 * torch.finfo(torch.float32).eps, "atol": 0.0}
    torch.testing.assert_close(transformed, by_hand.double(), **tolerance)
    torch.testing.assert_close(layer(x).detach(), by_hand.float(), **tolerance)
    torch.testing.assert_close(ours, by_hand.float(), **tolerance)
    torch.testing.assert_close(ours.mean((0, 2, 3)), beta, **tolerance)
    torch.testing.assert_close(ours.std((0, 2, 3), correction=0), gamma, rtol=1e-3, atol=0.0)


# Every shape, layout and dtype.


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    layout: str
    dtype: torch.dtype
    parameters: torch.dtype
    present: frozenset[str]
    residual: str | None
    dy: str
    activation: Activation | None
    training: bool
    momentum: float
    eps: float
    offset: float
    scale: float
    plan: int | None
    seed: int

    def inputs(self) -> Inputs:
        channels = self.shape[1]
        x = self.offset + self.scale * randn(*self.shape, seed=self.seed)
        parameters = {
            "weight": randn(channels, seed=self.seed + 1),
            "bias": randn(channels, seed=self.seed + 2),
            "running_mean": self.offset + self.scale * randn(channels, seed=self.seed + 3),
            "running_var": self.scale**2 * (0.1 + randn(channels, seed=self.seed + 4).square()),
        }
        residual = None
        if self.residual is not None:
            residual = oracle.arrange(
                randn(*self.shape, seed=self.seed + 5).to(self.dtype), self.residual
            )
        return Inputs(
            x=oracle.arrange(x.to(self.dtype), self.layout),
            residual=residual,
            dy=oracle.arrange(randn(*self.shape, seed=self.seed + 6).to(self.dtype), self.dy),
            **{
                k: v.to(self.parameters) if k in self.present else None
                for k, v in parameters.items()
            },
        )


def shapes() -> st.SearchStrategy[tuple[int, ...]]:
    """(N, C, *) of some thousand values, and more than one a channel: interpreted programs take long."""
    size = st.sampled_from([1, 2, 3, 4, 5, 7, 8, 13])
    channels = st.sampled_from([1, 2, 3, 5, 8, 13, 16, 31, 64])
    images = st.integers(0, 4).flatmap(lambda spatial: st.tuples(size, channels, *[size] * spatial))
    usual = st.tuples(
        st.integers(1, 12), channels, st.sampled_from([7, 14]), st.sampled_from([7, 14])
    )
    long = st.tuples(st.integers(300, 4000), st.integers(1, 4))
    long_with_space = st.tuples(st.integers(100, 1000), st.integers(1, 4), st.integers(1, 5))
    wide = st.tuples(st.integers(1, 4), st.integers(100, 400), st.integers(1, 4))
    return st.one_of(images, usual, long, long_with_space, wide).filter(
        lambda s: math.prod(s) <= 8000 and math.prod(s) > s[1]
    )


@st.composite
def cases(draw: st.DrawFn) -> Case:
    dtype = draw(st.sampled_from(DTYPES))
    training = draw(st.booleans())
    layouts = st.sampled_from(["contiguous", "channels_last", *oracle.LAYOUTS])
    present = {name for name in ("weight", "bias") if draw(st.booleans())}
    if not training or draw(st.booleans()):
        present |= {"running_mean", "running_var"}
    names = st.sampled_from(ACTIVATIONS)
    activation = draw(st.none() | st.sampled_from(["relu", "silu"]) | names)
    return Case(
        shape=draw(shapes()),
        layout=draw(layouts),
        dtype=dtype,
        parameters=draw(
            st.sampled_from([dtype, dtype if dtype == torch.float64 else torch.float32])
        ),
        present=frozenset(present),
        residual=draw(st.none() | layouts),
        dy=draw(layouts),
        activation=Activation.of(activation),
        training=training,
        momentum=draw(st.sampled_from([0.1, 0.0, 1.0, 0.7])),
        eps=draw(st.sampled_from([1e-5, 1e-3, 0.5])),
        offset=draw(st.sampled_from([0.0, 0.0, 1.0, -30.0])),
        scale=draw(st.sampled_from([1.0, 1.0, 0.05, 4.0])),
        plan=draw(st.none() | st.integers(0, 60)),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases())
@example(  # F.gelu on a CPU, in float32, is further off
    Case(
        shape=(1, 31, 14, 14),
        layout="contiguous",
        dtype=torch.float32,
        parameters=torch.float32,
        present=frozenset({"weight", "bias"}),
        residual=None,
        dy="contiguous",
        activation=Activation.of("gelu"),
        training=True,
        momentum=0.1,
        eps=1e-5,
        offset=0.0,
        scale=1.0,
        plan=None,
        seed=1,
    )
)
@example(  # every value of a channel is the same, and so is what each addition rounds off
    Case(
        shape=(304, 4, 1),
        layout="expanded_batch",
        dtype=torch.float16,
        parameters=torch.float32,
        present=frozenset({"weight", "bias"}),
        residual=None,
        dy="expanded_batch",
        activation=Activation.of("silu"),
        training=True,
        momentum=0.1,
        eps=1e-3,
        offset=0.0,
        scale=1.0,
        plan=55,
        seed=55,
    )
)
def test_any_input_agrees_with_float64(path: Path, case: Case) -> None:
    path.plan = case.plan
    inputs = case.inputs().to(path.device)
    # Expanded, or of a dtype that knows few numbers around the mean: errors are then repeated, too.
    tensors = [t for t in (inputs.x, inputs.dy, inputs.residual) if t is not None]
    repeated = any(2 * t.unique().numel() < t.numel() for t in tensors if t.dtype.itemsize > 2)
    repeated = repeated or any(t.unique().numel() < 100 for t in tensors)
    got = check(
        inputs, case.training, path,
        activation=case.activation, momentum=case.momentum, eps=case.eps, rms=not repeated,
    )  # fmt: skip
    for name in ("y", "dx"):
        assert layout(got[name]) == layout(torch.empty_like(inputs.x)), (
            f"{name} has another layout than x"
        )


def test_the_oracle_agrees_with_pytorch(device: torch.device) -> None:
    """What judges everything else is itself F.batch_norm with autograd, in float64."""
    for training, activation in product((True, False), (None, "relu", "mish")):
        inputs = Inputs.of(3, 4, 5, dtype=torch.float64, residual=True)
        want = oracle.batch_norm(
            inputs.x, inputs.running_mean, inputs.running_var, inputs.weight, inputs.bias, training,
            residual=inputs.residual, dy=inputs.dy, activation=activation,
        )  # fmt: skip
        leaves = [
            t.requires_grad_() for t in (inputs.x, inputs.weight, inputs.bias, inputs.residual)
        ]
        x, weight, bias, residual = leaves
        y = (
            F.batch_norm(x, inputs.running_mean, inputs.running_var, weight, bias, training)
            + residual
        )
        y = oracle.activate(y, Activation.of(activation))
        gradients = torch.autograd.grad(y, leaves, inputs.dy)
        got = dict(zip(["y", "dx", "dweight", "dbias", "dresidual"], [y, *gradients], strict=True))
        if training:
            got |= {"running_mean": inputs.running_mean, "running_var": inputs.running_var}
        assert got.keys() == want.keys()
        for name, tensor in got.items():
            torch.testing.assert_close(tensor, want[name].value, rtol=1e-12, atol=1e-13, msg=name)


# Numbers.


@EACH_DRIVER
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
def test_a_mean_far_from_zero_costs_the_variance_nothing(
    path: Path, driver: str, ratio: float, layout: str
) -> None:
    path.driver = driver
    for shape in ((2, 3, 4), (40, 3, 5, 5)):
        inputs = Inputs.of(*shape)
        inputs.x = oracle.arrange(randn(*shape, dtype=torch.float64).add(ratio).float(), layout)
        check(inputs.to(path.device), True, path, momentum=1.0)


@EACH_DRIVER
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_an_outlying_first_value_does_not_spoil_the_variance(
    path: Path, driver: str, layout: str
) -> None:
    """A variance taken about the first value would cancel all its digits here."""
    path.driver = driver
    values = randn(100, 3, 4, dtype=torch.float64).add(1e4).float()
    values[0, :, 0] = torch.tensor([0.0, -1e4, 3e4])
    inputs = Inputs.of(100, 3, 4)
    inputs.x = oracle.arrange(values, layout)
    check(inputs.to(path.device), True, path, momentum=1.0, rms=False)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_mean_is_corrected_by_the_deviations_from_it(path: Path, layout: str) -> None:
    """Where one program has a whole channel: its sum relative to an outlying value loses its last digits."""
    path.driver = "resident"
    inputs = Inputs.of(100, 3, 4)
    inputs.x[0, :, 0] = torch.tensor([1e3, -1e4, 3e4])
    inputs.x = oracle.arrange(inputs.x, layout)
    check(inputs.to(path.device), True, path, momentum=1.0, rms=False)


@EACH_DRIVER
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_channel_becomes_its_bias(path: Path, driver: str, dtype: torch.dtype) -> None:
    path.driver = driver
    # Of 24 bits, so that the oracle's own sums are exact.
    constants = torch.tensor([0.0, 1 / 3, -1e4 / 7, 1e30, 1e-20]).double()
    constants = constants.clamp_max(torch.finfo(dtype).max).to(dtype)
    inputs = Inputs.of(37, 6, 3, dtype=dtype)
    inputs.x[:, :5] = constants[:, None]
    inputs = inputs.to(path.device)
    got = check(inputs, True, path, momentum=1.0, rms=False)
    assert torch.equal(got["y"][:, :5], inputs.bias[:5, None].expand(37, 5, 3))
    assert torch.equal(got["running_mean"][:5].cpu(), constants)
    assert (got["running_var"][:5] == 0).all()


@EACH_DRIVER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_huge_and_tiny_values_are_normalized_like_others(
    path: Path, driver: str, dtype: torch.dtype
) -> None:
    """Up to where the sum of squares passes the largest number."""
    path.driver = driver
    inputs = Inputs.of(20, 4, 7, dtype=dtype)
    scales = torch.tensor([1e30 if dtype == torch.float64 else 1e17, 1.0, 1e-10, 1e-20])
    inputs.x = (inputs.x.double() * scales[:, None]).to(dtype)
    check(inputs.to(path.device), True, path, momentum=1.0, rms=False)


@EACH_DRIVER
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_variance_beyond_float32_is_infinite_and_normalizes_to_the_bias(
    path: Path, driver: str, dtype: torch.dtype
) -> None:
    path.driver = driver
    for layout in ("contiguous", "channels_last"):
        inputs = Inputs.of(20, 3, 7, dtype=dtype)
        inputs.x[:, 1] *= 1e30
        inputs.x = oracle.arrange(inputs.x, layout)
        inputs = inputs.to(path.device)
        got = results(inputs, True, activation="elu", momentum=1.0)
        bias = F.elu(inputs.bias[1].float())
        torch.testing.assert_close(got["y"][:, 1].float(), bias.expand(20, 7), rtol=1e-2, atol=0)
        assert got["running_var"][1] == math.inf
        assert (got["dx"][:, 1] == 0).all()
        assert all(t.isfinite().all() for t in (got["y"], got["dx"], got["running_mean"]))
        assert got["running_var"][::2].isfinite().all()


@pytest.mark.parametrize(
    ("driver", "training"),
    [("resident", True), ("split", True), ("streamed", True), ("split", False)],
    ids=["resident", "split", "streamed", "eval"],
)
def test_nan_and_infinity_stay_in_their_channel(path: Path, driver: str, training: bool) -> None:
    path.driver = driver
    clean, poisoned = [0, 4], [1, 2, 3]
    for layout in ("contiguous", "channels_last"):
        inputs = Inputs.of(20, 5, 3, layout=layout, residual=True)
        want = results(inputs.to(path.device), training, activation="relu6")
        inputs.x[4, 1:4, 1] = torch.tensor([math.nan, math.inf, -math.inf])
        inputs = inputs.to(path.device)
        got = results(inputs, training, activation="relu6")
        for name, tensor in got.items():
            pair = (t if t.dim() == 1 else t.transpose(0, 1) for t in (tensor, want[name]))
            assert torch.equal(*(t[clean] for t in pair)), f"{name} of another channel changed"
        statistics = [t.clone() for t in inputs.statistics()]
        expected = F.batch_norm(inputs.x, *statistics, inputs.weight, inputs.bias, training)
        expected = F.relu6(expected + inputs.residual)
        assert torch.equal(got["y"].isnan(), expected.isnan())
        if training:
            assert got["dx"][:, poisoned].isnan().all()
            assert got["running_var"][poisoned].isnan().all()
            assert not got["running_mean"][poisoned].isfinite().any()


@EACH_DRIVER
def test_each_driver_runs_kernels_of_its_own(path: Path, driver: str) -> None:
    """So that the tests of a driver above are tests of that driver."""
    path.driver = driver
    results(Inputs.of(20, 3, 7).to(path.device), True)
    kernels = {
        "resident": ["forward_kernel", "backward_kernel"],
        "split": [
            "moments_kernel", "normalize_kernel", "backward_reduce_kernel", "backward_apply_kernel",
        ],
        "streamed": ["forward_streamed_kernel", "backward_streamed_kernel"],
    }  # fmt: skip
    assert path.launches == (kernels[driver] if path.name == "kernels" else [])


@pytest.mark.parametrize(
    ("driver", "training"),
    [("resident", True), ("split", True), ("streamed", True), ("split", False)],
    ids=["resident", "split", "streamed", "eval"],
)
def test_the_same_call_gives_the_same_bits(path: Path, driver: str, training: bool) -> None:
    path.driver = driver
    for layout in ("contiguous", "channels_last"):
        inputs = Inputs.of(15, 5, 7, 3, layout=layout, residual=True).to(path.device)
        first, again = (results(inputs, training, activation="silu") for _ in range(2))
        assert all(torch.equal(first[name], again[name]) for name in first)


# Semantics.


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.9, 1.0, -0.5, 1.7])
def test_running_statistics_move_by_the_momentum(path: Path, momentum: float) -> None:
    check(Inputs.of(7, 3, 5).to(path.device), True, path, momentum=momentum)


def test_running_statistics_are_left_alone_in_eval_and_by_nobody_asking(path: Path) -> None:
    inputs = Inputs.of(7, 3, 5).to(path.device)
    before = [t.clone() for t in inputs.statistics()]
    batch_norm(inputs.x, *inputs.statistics())
    assert all(torch.equal(a, b) for a, b in zip(before, inputs.statistics(), strict=True))
    without = batch_norm(inputs.x, None, None, training=True)
    assert torch.equal(without, batch_norm(inputs.x, *inputs.statistics(), training=True))


@MODES
@pytest.mark.parametrize(
    "shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0), (2, 3, 4, 0), (2, 0), (2, 0, 4)]
)
@pytest.mark.parametrize("activation", [None, "relu", "gelu"])
def test_an_empty_batch_has_zero_gradients_and_no_statistics(
    path: Path, shape: tuple[int, ...], activation: str | None, training: bool
) -> None:
    for dtype in (torch.float32, torch.float16):
        inputs = Inputs.of(*shape, dtype=dtype, parameters=torch.float32, residual=True).to(
            path.device
        )
        got = results(inputs, training, activation=activation)
        for name in ("x", "weight", "bias", "residual"):
            source, gradient = getattr(inputs, name), got[f"d{name}"]
            assert gradient.shape == source.shape
            assert gradient.dtype == source.dtype
            assert (gradient == 0).all()
        assert got["y"].shape == shape
        assert got["y"].dtype == dtype
        if training:
            assert torch.equal(got["running_mean"], inputs.running_mean)
            assert torch.equal(got["running_var"], inputs.running_var)
    assert not path.launches


@MODES
@pytest.mark.parametrize("weight", [True, False])
def test_weight_and_bias_may_come_alone(path: Path, weight: bool, training: bool) -> None:
    inputs = Inputs.of(7, 3, 5).to(path.device)
    if weight:
        inputs.bias = None
    else:
        inputs.weight = None
    check(inputs, training, path, activation="elu")


@MODES
def test_a_parameter_may_be_a_view_with_strides(path: Path, training: bool) -> None:
    """One value expanded to all channels, say."""
    inputs = Inputs.of(7, 3, 5).to(path.device)
    inputs.weight = randn(6, seed=1).to(path.device)[::2]
    inputs.bias = randn(1, seed=2).to(path.device).expand(3)
    check(inputs, training, path)


LEAVES = ("x", "weight", "bias", "residual")


@MODES
@pytest.mark.parametrize("activation", [None, "leaky_relu", "silu"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_any_subset_of_inputs_may_want_a_gradient(
    path: Path, residual: bool, activation: str | None, training: bool
) -> None:
    for mask in range(1, 2 ** (3 + residual)):
        needs = tuple(name for i, name in enumerate(LEAVES) if mask >> i & 1)
        inputs = Inputs.of(5, 3, 4, residual=residual).to(path.device)
        got = check(inputs, training, path, needs=needs, activation=activation)
        assert {f"d{name}" for name in needs} <= got.keys()


@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_calls_before_backward_do_not_disturb_one_another(
    path: Path, activation: str | None
) -> None:
    """In training and in eval by turns, with running statistics that move in between."""
    inputs = Inputs.of(5, 3, 4).to(path.device)
    leaves = [t.clone().requires_grad_() for t in (inputs.x, inputs.weight, inputs.bias)]
    running = [t.clone() for t in inputs.statistics()]
    wanted, outputs = [], []
    for training, scale in ((True, 1.0), (False, 2.0), (True, 3.0), (False, 4.0)):
        now = Inputs(
            inputs.x * scale,
            inputs.weight,
            inputs.bias,
            None,
            *(t.clone() for t in running),
            inputs.dy,
        )
        wanted.append(results(now, training, activation=activation))
        outputs.append(
            batch_norm(leaves[0] * scale, *running, *leaves[1:], training, activation=activation)
        )
    for y, want, scale in zip(outputs, wanted, (1.0, 2.0, 3.0, 4.0), strict=True):
        dx, dweight, dbias = torch.autograd.grad(y, leaves, inputs.dy)
        assert torch.equal(dx, want["dx"] * scale)
        assert torch.equal(dweight, want["dweight"])
        assert torch.equal(dbias, want["dbias"])


@MODES
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_the_gradient_of_y_may_have_any_layout(
    path: Path, activation: str | None, training: bool
) -> None:
    layouts = ("contiguous", "channels_last", "transposed", "cropped", "misaligned")
    for layout, other in product(("contiguous", "channels_last"), layouts):
        inputs = Inputs.of(2, 3, 2, 5, layout=layout, residual=True)
        inputs.dy = oracle.arrange(inputs.dy, other)
        check(inputs.to(path.device), training, path, activation=activation)
        # Without parameters, evaluation keeps no x whose layout could be asked.
        frozen = Inputs(inputs.x, None, None, None, *inputs.statistics(), inputs.dy)
        got = check(frozen.to(path.device), training, path, activation=activation)
        assert got["dx"].stride() == inputs.x.stride()


@MODES
def test_a_sum_can_be_differentiated(path: Path, training: bool) -> None:
    """dy is then one value, expanded."""
    inputs = Inputs.of(5, 3, 4, layout="channels_last").to(path.device)
    inputs.dy = torch.ones_like(inputs.x)
    got = results(inputs, training, activation="silu")
    x = inputs.x.clone().requires_grad_()
    statistics = [t.clone() for t in inputs.statistics()]
    batch_norm(
        x, *statistics, inputs.weight, inputs.bias, training, activation="silu"
    ).sum().backward()
    torch.testing.assert_close(x.grad, got["dx"], rtol=0, atol=1e-7)


@MODES
def test_nothing_is_recorded_where_no_gradient_is_wanted(path: Path, training: bool) -> None:
    inputs = Inputs.of(5, 3, 4).to(path.device)
    want = results(inputs, training, activation="relu")["y"]

    def call(x: Tensor) -> Tensor:
        statistics = [t.clone() for t in inputs.statistics()]
        return batch_norm(x, *statistics, inputs.weight, inputs.bias, training, activation="relu")

    assert not call(inputs.x).requires_grad
    wanting = inputs.x.clone().requires_grad_()
    with torch.no_grad():
        y = call(wanting)
    assert y.grad_fn is None
    assert torch.equal(y, want)
    with torch.inference_mode():
        y = call(wanting)
        assert y.is_inference()
        assert torch.equal(y, want)
    assert call(wanting).requires_grad


@MODES
@pytest.mark.parametrize("weight", [True, False], ids=["weight", ""])
def test_the_bias_may_change_before_backward_where_no_gradient_depends_on_it(
    path: Path, weight: bool, training: bool
) -> None:
    inputs = Inputs.of(5, 3, 4, dtype=torch.bfloat16).to(path.device)
    got = []
    for change in (0, 100):
        x = inputs.x.clone().requires_grad_()
        bias = x.new_tensor([[0.5], [1.0], [-2.0]]).requires_grad_()
        scale = x.new_full((3,), 2.0) if weight else None
        y = batch_norm(x, *inputs.statistics(), scale, bias, training)
        with torch.no_grad():
            bias.add_(change)
        got.append(torch.autograd.grad(y, (x, bias), inputs.x, create_graph=change > 0))
        y = batch_norm(x, *inputs.statistics(), scale, bias, training)
        got.append(torch.autograd.grad(y, (x, bias), inputs.x))
        assert (got[-1][1].shape, got[-1][1].dtype) == (bias.shape, bias.dtype)
    for found in got[1:]:
        for a, b in zip(found, got[0], strict=True):
            torch.testing.assert_close(a.float(), b.float(), rtol=2**-6, atol=2**-6)
    y = batch_norm(x, *inputs.statistics(), scale, bias, training, activation="silu")
    with torch.no_grad():
        bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@MODES
@pytest.mark.parametrize("changed", ["x", "weight"])
def test_a_value_kept_for_backward_and_changed_in_place_is_an_error(
    path: Path, changed: str, training: bool
) -> None:
    inputs = Inputs.of(5, 3, 4).to(path.device)
    leaves = {name: getattr(inputs, name).clone().requires_grad_() for name in ("x", "weight")}
    tensors = {name: leaf * 1 for name, leaf in leaves.items()}
    y = batch_norm(tensors["x"], *inputs.statistics(), tensors["weight"], None, training)
    tensors[changed].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@MODES
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((3,), None), ((1, 3, 1), None), ((2, 5, 3, 4), None), ((5, 3, 4), torch.float64), ((), None)],
    ids=str,
)
def test_a_residual_is_added_as_pytorch_adds(
    path: Path, shape: tuple[int, ...], dtype: torch.dtype | None, training: bool
) -> None:
    """Broadcast and promoted."""
    inputs = Inputs.of(5, 3, 4).to(path.device)
    if shape == (3,):
        inputs = Inputs.of(5, 3, 3).to(path.device)
    residual = randn(*shape, seed=9, dtype=dtype or torch.float32).to(path.device).requires_grad_()
    arguments = (inputs.weight, inputs.bias, training)
    plain = batch_norm(inputs.x, *(t.clone() for t in inputs.statistics()), *arguments)
    want = F.relu(plain + residual)
    got = batch_norm(
        inputs.x, *inputs.statistics(), *arguments, residual=residual, activation="relu"
    )
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want)
    dy = randn(*want.shape, seed=10, dtype=want.dtype).to(path.device)
    mine, theirs = (torch.autograd.grad(y, residual, dy)[0] for y in (got, want))
    torch.testing.assert_close(mine, theirs)


# Activations.


@EACH_ACTIVATION
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_activation_is_pytorchs_at_every_special_point(
    path: Path, activation: str | Activation, dtype: torch.dtype
) -> None:
    """Value and slope at kinks, in both tails, and where there is no number.

    Evaluation by mean 0 and variance 1 without eps hands x to the activation as it is.
    """
    activation = Activation.of(activation)
    points = [
        0.0,
        -0.0,
        1e-30,
        -1e-30,
        1e-6,
        -1e-6,
        1e-3,
        -1e-3,
        0.3,
        -0.3,
        1.0,
        -1.0,
        3.0,
        -3.0,
        6.0,
        -6.0,
    ]
    points += [
        2.999,
        -2.999,
        3.001,
        -3.001,
        10.0,
        -10.0,
        20.0,
        -20.0,
        20.5,
        30.0,
        -30.0,
        88.0,
        -88.0,
        100.0,
    ]
    points += [-100.0, 1e4, -1e4, 1e30, -1e30]
    special = [math.nan, math.inf, -math.inf]
    x = torch.tensor(points + special, dtype=dtype, device=path.device)[:, None]
    statistics = (
        torch.zeros(1, dtype=dtype, device=path.device),
        torch.ones(1, dtype=dtype, device=path.device),
    )
    for residual in (None, torch.zeros_like(x)):
        leaf = x.clone().requires_grad_()
        y = batch_norm(leaf, *statistics, eps=0.0, residual=residual, activation=activation)
        (slope,) = torch.autograd.grad(y.sum(), leaf)
        at = x.double().cpu()
        want, want_slope = oracle.activate(at, activation), oracle.slope(at, activation)
        n = len(points)
        eps = torch.finfo(dtype).eps
        tolerance = 4 * eps * (want.abs() + at.abs()) + torch.finfo(dtype).smallest_normal
        assert ((y.detach().double().cpu() - want)[:n].abs() <= tolerance[:n]).all()
        tolerance = 4 * eps * (1 + at.abs().clamp_max(100))
        assert ((slope.double().cpu() - want_slope)[:n].abs() <= tolerance[:n]).all()
        # Where there is no number, as PyTorch in this dtype or in float64: they are not always one (gelu).
        theirs = oracle.activate(x, activation)[n:].double().cpu()
        got = y.detach()[n:].double().cpu()
        for mine, *allowed in zip(got, theirs, want[n:], strict=True):
            assert any(torch.equal(mine.nan_to_num(7.0), a.nan_to_num(7.0)) for a in allowed)
        assert slope[n].isnan() or torch.isclose(slope[n].double().cpu(), want_slope[n])


@EACH_ACTIVATION
@pytest.mark.parametrize(
    ("layout", "residual", "training"),
    [("contiguous", False, False), ("channels_last", True, True)],
    ids=["eval", "training"],
)
def test_gradcheck(
    path: Path, activation: str | Activation, layout: str, residual: bool, training: bool
) -> None:
    inputs = Inputs.of(3, 2, 4, dtype=torch.float64, layout=layout, residual=residual).to(
        path.device
    )

    def call(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None = None) -> Tensor:
        statistics = [t.clone() for t in inputs.statistics()]
        return batch_norm(
            x, *statistics, weight, bias, training, residual=residual, activation=activation
        )

    leaves = [getattr(inputs, name) for name in LEAVES[: 3 + residual]]
    assert torch.autograd.gradcheck(
        call, [leaf.requires_grad_() for leaf in leaves], fast_mode=True
    )


# What is kept for backward.


def kept(
    inputs: Inputs,
    training: bool,
    activation: str | Activation | None,
    needs: tuple[str, ...] = LEAVES,
) -> list[Tensor]:
    """The tensors kept for backward that are not a channel's vectors, one for each storage."""
    tensors: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.numel() > 2 * inputs.x.shape[1]:
            tensors[tensor.data_ptr()] = tensor
        return tensor

    for name in LEAVES:
        if getattr(inputs, name) is not None:
            getattr(inputs, name).requires_grad_(name in needs)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        batch_norm(
            inputs.x, *inputs.statistics(), inputs.weight, inputs.bias, training,
            residual=inputs.residual, activation=activation,
        )  # fmt: skip
    return list(tensors.values())


@MODES
@pytest.mark.parametrize("activation", [None, *oracle.ACTIVATIONS])
def test_without_a_residual_backward_keeps_x_alone(
    path: Path, activation: str | None, training: bool
) -> None:
    inputs = Inputs.of(2, 8, 4, 4).to(path.device)
    (only,) = kept(inputs, training, activation)
    assert only.data_ptr() == inputs.x.data_ptr()


@MODES
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("activation", ["relu", "relu6", "leaky_relu"])
def test_with_a_residual_and_two_slopes_backward_keeps_x_and_y_or_a_bit_a_value(
    path: Path, activation: str, layout: str, training: bool
) -> None:
    """y, as PyTorch's activation and the next layer do; bits where it does not tell the slope."""
    inputs = Inputs.of(2, 8, 4, 4, layout=layout, residual=True).to(path.device)
    others = [t for t in kept(inputs, training, activation) if t.data_ptr() != inputs.x.data_ptr()]
    assert len(others) == 1
    assert others[0].nbytes == inputs.x.nbytes
    assert others[0].data_ptr() != inputs.residual.data_ptr()
    assert others[0].grad_fn is not None
    falling = Activation("leaky_relu", -0.5)
    x, bits = sorted(kept(inputs, training, falling), key=lambda t: -t.nbytes)
    assert x.data_ptr() == inputs.x.data_ptr()
    assert bits.nbytes == inputs.x.numel() // 8


def test_what_is_rounded_to_a_bend_has_the_slope_that_is_there(path: Path) -> None:
    """As PyTorch's activations take it, of what they are given: relu6's 6, relu's 0 in float16."""
    for name, dtype, value in (
        ("relu6", torch.float16, 5.999), ("relu", torch.float16, 1e-8), ("relu", torch.float16, 1e-3),
        (Activation("leaky_relu", -0.5), torch.float16, 1e-8),
    ):  # fmt: skip
        x = torch.zeros(2, 3, dtype=dtype, device=path.device)
        residual = torch.zeros_like(x).requires_grad_()
        mean, var = torch.zeros(3, device=path.device), torch.ones(3, device=path.device)
        bias = torch.full((3,), value, device=path.device)
        y = batch_norm(x, mean, var, None, bias, residual=residual, activation=name)
        (got,) = torch.autograd.grad(y.sum(), residual)
        rounded = bias.to(dtype).double()
        want = oracle.slope(rounded, Activation.of(name)).to(dtype).expand_as(got)
        assert torch.equal(got, want), (name, dtype, value)


@MODES
@pytest.mark.parametrize(
    "activation", ["silu", "hardswish", "gelu", "elu", "mish", "sigmoid", "tanh"]
)
def test_with_a_residual_and_another_activation_backward_keeps_x_and_the_residual_itself(
    path: Path, activation: str, training: bool
) -> None:
    inputs = Inputs.of(2, 8, 4, 4, residual=True).to(path.device)
    found = {t.data_ptr() for t in kept(inputs, training, activation)}
    assert found == {inputs.x.data_ptr(), inputs.residual.data_ptr()}


@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_with_frozen_parameters_in_eval_backward_does_not_keep_x(
    path: Path, residual: bool
) -> None:
    inputs = Inputs.of(2, 8, 4, 4, residual=residual).to(path.device)
    assert kept(inputs, False, None, needs=("x", "residual")) == []
    (y,) = kept(inputs, False, "relu", needs=("x", "residual"))
    assert y.nbytes == inputs.x.nbytes
    assert y.grad_fn is not None
    (bits,) = kept(inputs, False, Activation("leaky_relu", -0.5), needs=("x", "residual"))
    assert bits.nbytes == inputs.x.numel() // 8


# Errors.


def statistics(channels: int = 3, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.zeros(channels, dtype=dtype), torch.ones(channels, dtype=dtype)


X = torch.arange(12.0).reshape(4, 3)
TRAIN = {"training": True}
#: Ours about eps are the words of PyTorch 2.13; 2.11 has one sentence for training and evaluation.
EPS_WORDS = TorchVersion(torch.__version__) >= "2.13"
#: name: arguments, keywords, error, and whether PyTorch's words are ours.
ERRORS: dict[str, tuple[tuple[object, ...], dict[str, object], type[Exception], bool]] = {
    "no dimension": ((torch.tensor(1.0), None, None), TRAIN, IndexError, False),
    "one dimension": ((torch.ones(3), None, None), TRAIN, IndexError, True),
    "one value a channel": ((torch.ones(1, 3), *statistics()), TRAIN, ValueError, True),
    "one value in space": ((torch.ones(1, 3, 1, 1), *statistics()), TRAIN, ValueError, True),
    "one value without channels": ((torch.ones(1, 0), None, None), TRAIN, ValueError, True),
    "eps zero in training": ((X, *statistics()), {**TRAIN, "eps": 0.0}, ValueError, EPS_WORDS),
    "eps negative in training": ((X, *statistics()), {**TRAIN, "eps": -1e-5}, ValueError, EPS_WORDS),
    "eps negative in eval": ((X, *statistics()), {"eps": -1e-5}, ValueError, EPS_WORDS),
    "integer input": ((X.long(), None, None), TRAIN, NotImplementedError, True),
    "boolean input": ((X.bool(), None, None), TRAIN, NotImplementedError, True),
    "complex input": ((X.cfloat(), None, None), TRAIN, NotImplementedError, True),
    "float8 input": ((X.to(torch.float8_e4m3fn), None, None), TRAIN, NotImplementedError, True),
    "integer input in eval": ((X.int(), *statistics()), {}, NotImplementedError, True),
    "eval without statistics": ((X, None, None), {}, RuntimeError, True),
    "eval without mean": ((X, None, statistics()[1]), {}, RuntimeError, True),
    "eval without variance": ((X, statistics()[0], None), {}, RuntimeError, True),
    "training without mean": ((X, None, statistics()[1]), TRAIN, ValueError, True),
    "training without variance": ((X, statistics()[0], None), TRAIN, ValueError, True),
    "mean too short": ((X, statistics(2)[0], statistics()[1]), TRAIN, RuntimeError, True),
    "variance too long": ((X, statistics()[0], statistics(4)[1]), TRAIN, RuntimeError, True),
    "mean too short in eval": ((X, statistics(2)[0], statistics()[1]), {}, RuntimeError, True),
    "weight too short": ((X, *statistics(), torch.ones(2)), TRAIN, RuntimeError, True),
    "weight of one value": ((X, *statistics(), torch.ones(1)), TRAIN, RuntimeError, True),
    "bias too long": ((X, *statistics(), None, torch.ones(4)), TRAIN, RuntimeError, True),
    "weight in float64": ((X, *statistics(), torch.ones(3).double()), TRAIN, RuntimeError, False),
    "weight in float16": ((X, *statistics(), torch.ones(3).half()), TRAIN, RuntimeError, False),
    "weight of integers": ((X, *statistics(), torch.ones(3).long()), TRAIN, RuntimeError, False),
    "bias in float64": ((X, *statistics(), torch.ones(3), torch.ones(3).double()), TRAIN, RuntimeError, False),
    "statistics in float64": ((X, *statistics(dtype=torch.float64)), TRAIN, RuntimeError, False),
    "variance in float64": ((X, statistics()[0], statistics()[1].double()), TRAIN, RuntimeError, False),
    "statistics of integers": ((X, *statistics(dtype=torch.int64)), TRAIN, RuntimeError, False),
    "float64 beside float32": ((X.double(), *statistics()), TRAIN, RuntimeError, False),
    "float16 beside bfloat16": ((X.half(), None, None, torch.ones(3).bfloat16()), TRAIN, RuntimeError, False),
    "float16 beside both": (
        (X.half(), None, None, torch.ones(3).half(), torch.ones(3)), TRAIN, RuntimeError, False,
    ),
    "float16 beside float32 statistics and float16 weight": (
        (X.half(), *statistics(), torch.ones(3).half()), TRAIN, RuntimeError, False,
    ),
    "matrices as statistics": ((X, torch.zeros(3, 1), torch.ones(3, 1)), TRAIN, RuntimeError, False),
    "weight elsewhere": ((X, *statistics(), torch.ones(3, device="meta")), TRAIN, RuntimeError, False),
    "statistics elsewhere": (
        (X, *(t.to("meta") for t in statistics())), TRAIN, RuntimeError, False,
    ),
    "mean that wants a gradient": (
        (X, torch.zeros(3, requires_grad=True), torch.ones(3)), TRAIN, RuntimeError, False,
    ),
    "variance that wants a gradient": (
        (X, torch.zeros(3), torch.ones(3, requires_grad=True)), {}, RuntimeError, False,
    ),
    "momentum None": ((X, *statistics()), {**TRAIN, "momentum": None}, TypeError, False),
}  # fmt: skip


@pytest.mark.parametrize("momentum", [np.float32(0.25), np.float64(0.25), torch.tensor(0.25), True])
def test_momentum_and_eps_are_any_numbers_that_pytorch_takes(path: Path, momentum: Any) -> None:
    for eps in (1, np.float16(0.5), torch.tensor(0.5, dtype=torch.float64)):
        means = []
        for function in (batch_norm, F.batch_norm):
            mean, var = (t.to(path.device) for t in statistics())
            y = function(X.to(path.device), mean, var, training=True, momentum=momentum, eps=eps)
            means.append((y, mean, var))
        for a, b in zip(*means, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    "value",
    [torch.tensor([0.5]), torch.tensor(0.5, requires_grad=True), 1j, np.array(0.5), "1"],
    ids=str,
)
def test_what_is_no_number_for_pytorch_is_none_for_us(path: Path, value: Any) -> None:
    mean, var = (t.to(path.device) for t in statistics())
    for function in (batch_norm, F.batch_norm):
        with pytest.raises(TypeError, match=r"argument 'momentum'.* must be float, not"):
            function(X.to(path.device), mean, var, training=True, momentum=value)
        with pytest.raises(TypeError):
            function(X.to(path.device), mean, var, training=True, eps=value)
        assert (mean == 0).all()


@MODES
def test_running_statistics_may_be_columns_of_a_table(path: Path, training: bool) -> None:
    tables = torch.rand(2, 3, 4, device=path.device)
    x = X.to(path.device)
    got, want = tables.clone(), tables.clone()
    y = batch_norm(x, got[0, :, 1], got[1, :, 2], training=training)
    torch.testing.assert_close(y, F.batch_norm(x, want[0, :, 1], want[1, :, 2], training=training))
    torch.testing.assert_close(got, want)
    assert torch.equal(got, tables) == (not training)
    if training:  # where nothing could tell the channels apart
        with pytest.raises(RuntimeError, match="one place in memory"):
            batch_norm(x, tables[0, :1, 0].expand(3), tables[1, :, 0], training=True)


@MODES
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (3, 1, 1), (1, 3)])
def test_parameters_may_have_their_values_in_any_shape(
    path: Path, shape: tuple[int, ...], training: bool
) -> None:
    x = torch.randn(4, 3, 2, 5, generator=torch.Generator().manual_seed(0)).to(path.device)
    results = []
    for form in ((3,), shape):
        weight, bias = (
            torch.tensor(v, device=path.device).view(form).requires_grad_()
            for v in ([1.0, -2.0, 0.5], [0.0, 1.0, 3.0])
        )
        running = [t.to(path.device) for t in statistics()]
        y = batch_norm(x, *running, weight, bias, training, activation="elu")
        gradients = torch.autograd.grad(y.square().sum(), (weight, bias))
        assert gradients[0].shape == gradients[1].shape == torch.Size(form)
        results.append([y, *(g.flatten() for g in gradients)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_a_new_eps_needs_no_tensor_of_the_default_device(path: Path) -> None:
    with torch.device("meta"):
        y = batch_norm(X.to(path.device), None, None, training=True, eps=1.2345e-4)
    assert y.device.type == path.device.type


@pytest.mark.parametrize("name", ERRORS)
def test_bad_input_raises_what_pytorch_raises_and_changes_nothing(path: Path, name: str) -> None:
    arguments, keywords, error, same_words = ERRORS[name]
    moved = [
        a.detach().to(path.device).requires_grad_(a.requires_grad)
        if isinstance(a, Tensor) and a.device.type != "meta"
        else a
        for a in arguments
    ]
    before = [a.detach().clone() if isinstance(a, Tensor) else a for a in moved]
    with pytest.raises(error) as ours:
        batch_norm(*moved, **keywords)
    for now, then in zip(moved, before, strict=True):
        assert not isinstance(now, Tensor) or now.is_meta or torch.equal(now.detach(), then)
    assert not path.launches
    # PyTorch itself may have written to the running statistics by the time it notices.
    theirs = [
        a.detach().clone().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a
        for a in arguments
    ]
    with pytest.raises(error) as expected:
        F.batch_norm(*theirs, **keywords)
    assert type(ours.value) is type(expected.value)
    if same_words:
        assert str(ours.value) == str(expected.value)


@pytest.mark.parametrize(
    ("residual", "error"),
    [(torch.ones(5, 3), RuntimeError), (torch.ones(4, 3, device="meta"), RuntimeError)],
    ids=["shape", "device"],
)
def test_a_residual_that_cannot_be_added_is_an_error_before_anything_changes(
    path: Path, residual: Tensor, error: type[Exception]
) -> None:
    mean, var = (t.to(path.device) for t in statistics())
    if not residual.is_meta:
        residual = residual.to(path.device)
    with pytest.raises(error):
        batch_norm(X.to(path.device), mean, var, training=True, residual=residual)
    assert (mean == 0).all()
    assert (var == 1).all()


@pytest.mark.parametrize(
    ("activation", "words"),
    [
        ("swish", "'relu', 'relu6', 'leaky_relu', 'silu', .* but got 'swish'"),
        ("ReLU", "'relu', 'relu6', .* but got 'ReLU'"),
        ("", "'relu', .* but got ''"),
        (3, "but got 3"),
        (torch.nn.ReLU(), "but got ReLU"),
        pytest.param(F.relu, "but got <function relu", id="function"),
    ],
    ids=str,
)
def test_an_activation_that_is_not_known_is_an_error(
    path: Path, activation: object, words: str
) -> None:
    mean, var = (t.to(path.device) for t in statistics())
    with pytest.raises(ValueError, match=words):
        batch_norm(X.to(path.device), mean, var, training=True, activation=activation)
    assert (mean == 0).all()
