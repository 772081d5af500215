"""With a mask: batch norm over the values that take part, as if there were no others, whatever they hold."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import oracle
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from oracle import Path
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

import triton_bn
from triton_bn import Activation, route

path = oracle.path


@pytest.fixture
def plain(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's operators compute, on a CPU."""
    monkeypatch.setattr(route, "on_gpu", lambda x: False)


MASKS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "some": lambda shape, g: torch.rand(shape, generator=g) < 0.6,
    "few": lambda shape, g: torch.rand(shape, generator=g) < 0.1,
    "all": lambda shape, g: torch.ones(shape, dtype=torch.bool),
    "none": lambda shape, g: torch.zeros(shape, dtype=torch.bool),
    "one": lambda shape, g: (
        torch.arange(math.prod(shape)).view(shape) == int(torch.randint(10**6, (), generator=g)) % math.prod(shape)
    ),
    "two": lambda shape, g: torch.arange(math.prod(shape)).view(shape) >= math.prod(shape) - 2,
    "empty rows": lambda shape, g: (
        (torch.arange(shape[0]) % 3 == 1).view(-1, *[1] * (len(shape) - 1)).expand(shape)
    ),
    "lengths": lambda shape, g: (
        torch.arange(math.prod(shape[1:])) < torch.randint(0, math.prod(shape[1:]) + 1, (shape[0], 1), generator=g)
    ).view(shape),
}  # fmt: skip
SHAPES = [
    (7, 3),
    (5, 4, 11),
    (3, 5, 4, 6),
    (2, 3, 2, 3, 5),
    (40, 2, 3),
    (1, 2, 130),
    (3, 17, 1),
    (2, 1, 3, 3),
]
LOST = (math.nan, math.inf, -math.inf, 1e30)


def gathered(t: Tensor, mask: Tensor) -> Tensor:
    """(N, C, *) → (k, C): what takes part."""
    return t.movedim(1, -1)[mask]


def spoilt(t: Tensor, mask: Tensor) -> Tensor:
    """The values, and whatever there may be where none take part."""
    lost = torch.tensor(LOST)[torch.arange(t.numel()) % len(LOST)].view(t.shape)
    return torch.where(mask.unsqueeze(1), t, lost.to(t.dtype))


def masked(
    layer: Any, x: Tensor, mask: Tensor, residual: Tensor | None, dy: Tensor
) -> dict[str, Tensor]:
    """What a call gives, with its gradients, where the mask is True; it is 0 elsewhere."""
    found = triton_bn.oracle.observe(lambda x, r: layer(x, r, mask=mask), layer, x, dy, residual)
    for name in ("y", "dx", "dresidual"):
        if name in found:
            assert found[name].shape == x.shape
            outside = ~mask.unsqueeze(1).expand(x.shape)
            assert not found[name][outside].any(), f"{name} is not 0 where the mask is False"
            found[name] = gathered(found[name], mask)
    return found


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    return {
        "shape": draw(st.sampled_from(SHAPES)),
        "kind": draw(st.sampled_from([*MASKS, "some", "lengths"])),
        "layout": draw(st.sampled_from(["contiguous", "channels_last", "transposed", "sliced_channels", "cropped"])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64])),
        "activation": draw(st.sampled_from([None, "relu", "silu", Activation("leaky_relu", 0.3)])),
        "residual": draw(st.booleans()),
        "training": draw(st.sampled_from([True, True, False])),
        "momentum": draw(st.sampled_from([0.1, 1.0, None])),
        "affine": draw(st.booleans()),
        "offset": draw(st.sampled_from([0.0, 100.0])),
        "strides": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**20)),
    }  # fmt: skip


def holds(case: dict[str, Any], device: torch.device, interpreted: bool) -> None:
    """One call against float64 over the gathered values."""
    g = torch.Generator().manual_seed(case["seed"])
    shape, dtype = case["shape"], case["dtype"]
    mask = MASKS[case["kind"]]((shape[0], *shape[2:]), g)
    x = torch.randn(shape, generator=g).to(dtype) * 2 + case["offset"]
    residual = torch.randn(shape, generator=g).to(dtype) if case["residual"] else None
    dy = torch.randn(shape, generator=g).to(dtype)
    width = torch.float64 if dtype == torch.float64 else torch.float32
    layer: Any = {2: triton_bn.BatchNorm1d, 3: triton_bn.BatchNorm1d, 4: triton_bn.BatchNorm2d}.get(
        len(shape), triton_bn.BatchNorm3d
    )(
        shape[1], momentum=case["momentum"], affine=case["affine"], activation=case["activation"],
        dtype=width, device=device,
    )  # fmt: skip
    layer.train(case["training"])
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    layer.num_batches_tracked.fill_(3)
    if case["affine"]:
        nn.init.uniform_(layer.weight, -1, 1)
        nn.init.uniform_(layer.bias, -1, 1)
    before = copy.deepcopy(layer)
    count = int(mask.sum())

    given = oracle.arrange(spoilt(x, mask), case["layout"]).to(device)
    shown = mask.to(device)
    if case["strides"]:
        shown = torch.stack([shown, ~shown], -1)[..., 0]
    rest = None if residual is None else spoilt(residual, mask).to(device)
    if case["training"] and count == 1:
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            layer(given, rest, mask=shown)
        assert layer.num_batches_tracked == 3
        assert torch.equal(layer.running_mean, before.running_mean)
        return
    found = masked(layer, given, shown, rest, spoilt(dy, mask).to(device))
    assert layer.num_batches_tracked == 3 + case["training"]
    if case["training"] and count == 0:
        assert torch.equal(layer.running_mean, before.running_mean)
        assert torch.equal(layer.running_var, before.running_var)
        for name in ("dweight", "dbias"):
            assert name not in found or not found[name].any()
        return
    if count == 0:
        return
    momentum = 0.25 if case["momentum"] is None else case["momentum"]
    wanted = oracle.batch_norm(
        gathered(x, mask), before.running_mean, before.running_var, before.weight, before.bias,
        case["training"], momentum, layer.eps,
        residual=None if residual is None else gathered(residual, mask),
        activation=layer.activation, dy=gathered(dy, mask), interpreted=interpreted,
    )  # fmt: skip
    for name, bounded in wanted.items():
        bounded.assert_close(found[name].cpu(), name, rms=False)
    if not case["training"]:
        assert torch.equal(layer.running_mean, before.running_mean)


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=calls())
def test_equals_batch_norm_over_the_gathered_values_in_pytorchs_operators(
    case: dict[str, Any], plain: None
) -> None:
    holds(case, torch.device("cpu"), False)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    case=calls(),
    plan=st.integers(0, 40),
    driver=st.sampled_from(["resident", "split", "streamed", None]),
)
def test_equals_batch_norm_over_the_gathered_values(
    case: dict[str, Any], plan: int, driver: str | None, path: Path
) -> None:
    path.plan, path.driver = plan, driver
    holds(case, path.device, path.interpreted)


@pytest.mark.parametrize("driver", ["resident", "split", "streamed"])
def test_a_mask_that_leaves_nothing_advances_the_counter_alone(driver: str, path: Path) -> None:
    path.driver = driver
    case = {
        "shape": (3, 5, 4, 6), "kind": "none", "layout": "contiguous", "dtype": torch.float32, "activation": "silu",
        "residual": True, "training": True, "momentum": 1.0, "affine": True, "offset": 9.0, "strides": False, "seed": 0,
    }  # fmt: skip
    holds(case, path.device, path.interpreted)


def test_far_from_zero_the_shift_is_a_value_that_takes_part(device: torch.device) -> None:
    torch.manual_seed(0)
    x = 1e4 + torch.randn(4, 3, 500)
    mask = torch.arange(500) >= torch.tensor([[400], [500], [100], [0]])
    layer = triton_bn.BatchNorm1d(3, momentum=1.0).to(device)
    layer(torch.where(mask[:, None], x, 0.0).to(device), mask=mask.to(device))
    wanted = gathered(x.double(), mask).var(0)
    torch.testing.assert_close(layer.running_var.cpu().double(), wanted, rtol=2e-6, atol=0)


def test_an_infinite_value_that_takes_part_does_what_it_does_without_a_mask(plain: None) -> None:
    x, mask = torch.randn(3, 2, 5), torch.ones(3, 5, dtype=torch.bool)
    x[0, 0, 0], mask[1, 2] = math.inf, False
    layer = triton_bn.BatchNorm1d(2)
    y = layer(x, mask=mask)
    wanted = F.batch_norm(gathered(x, mask), None, None, training=True)
    torch.testing.assert_close(gathered(y, mask), wanted, equal_nan=True)


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "shape": (torch.ones(4, 3, dtype=torch.bool), RuntimeError, r"shape \[4, 5\] .* got \[4, 3\]"),
    "with channels": (torch.ones(4, 1, 5, dtype=torch.bool), RuntimeError, r"got \[4, 1, 5\]"),
    "dtype": (torch.ones(4, 5), RuntimeError, "dtype torch.bool, but got torch.float32"),
    "device": (torch.ones(4, 5, dtype=torch.bool, device="meta"), RuntimeError, "mask is on meta"),
    "no tensor": ([[True] * 5] * 4, TypeError, "'mask' must be Tensor, not list"),
}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("training", [True, False])
def test_a_mask_that_does_not_fit_is_refused_and_changes_nothing(bad: str, training: bool) -> None:
    mask, error, words = BAD[bad]
    layer = triton_bn.BatchNorm1d(3).train(training)
    with pytest.raises(error, match=words):
        layer(torch.randn(4, 3, 5), mask=mask)
    assert layer.num_batches_tracked == 0
    assert not layer.running_mean.any()
    with pytest.raises(ValueError, match="more than 1 value per channel"):  # as without a mask
        triton_bn.BatchNorm1d(3)(torch.randn(1, 3), mask=torch.ones(1, dtype=torch.bool))


def test_a_residual_that_broadcasts_or_promotes(plain: None) -> None:
    x, mask = torch.randn(4, 3, 5).half(), torch.rand(4, 5) < 0.7
    layer = triton_bn.BatchNorm1d(3, activation="relu")
    for residual in (
        torch.randn(5),
        torch.randn(4, 3, 5),
        torch.randn(1, 3, 1).half(),
        torch.tensor(2.0),
    ):
        y = layer(x, residual, mask=mask)
        bn = F.batch_norm(gathered(x, mask).float(), None, None, training=True).half()
        wanted = F.relu(bn + gathered(residual.expand(x.shape), mask))
        assert y.dtype == wanted.dtype
        torch.testing.assert_close(gathered(y, mask), wanted, rtol=2e-3, atol=2e-3)
        assert not y[~mask.unsqueeze(1).expand(x.shape)].any()
    with pytest.raises(RuntimeError, match="shape"):
        layer(x, torch.randn(7), mask=mask)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_derivatives_of_any_order_and_forward_mode(training: bool, plain: None) -> None:
    torch.manual_seed(0)
    layer = triton_bn.BatchNorm1d(2, momentum=0.0, activation="silu", dtype=torch.float64)
    layer.train(training)
    mask = torch.rand(3, 4) < 0.6
    x, residual = (torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def call(x: Tensor, residual: Tensor) -> Tensor:
        return layer(x, residual, mask=mask)

    assert gradcheck(call, (x, residual), check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(call, (x, residual))


def test_torch_func_export_and_compile(plain: None) -> None:
    torch.manual_seed(0)
    layer = triton_bn.BatchNorm1d(3)
    x, mask = torch.randn(4, 3, 5), torch.rand(4, 5) < 0.7
    twin = copy.deepcopy(layer)
    wanted = twin(x, mask=mask)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = copy.deepcopy(layer)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.bn(x, mask=mask)

    compiled = Model()
    y = torch.compile(compiled, backend="aot_eager", fullgraph=True)(x, mask)
    torch.testing.assert_close(y, wanted)
    torch.testing.assert_close(compiled.bn.state_dict(), twin.state_dict())
    program = torch.export.export(Model(), (x, mask))
    assert not any("triton_bn" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x, mask), wanted)
    stateless = triton_bn.BatchNorm1d(3, track_running_stats=False)
    many, masks = torch.randn(2, 4, 3, 5), torch.rand(2, 4, 5) < 0.7
    found = torch.func.vmap(lambda x, m: stateless(x, mask=m))(many, masks)
    for one, m, y in zip(many, masks, found, strict=True):
        torch.testing.assert_close(y, stateless(one, mask=m))


def test_inside_recompute_and_autocast(plain: None) -> None:
    torch.manual_seed(0)
    layer, head = triton_bn.BatchNorm1d(3, activation="relu"), nn.Conv1d(3, 2, 1)
    x, mask = torch.randn(4, 3, 5, requires_grad=True), torch.rand(4, 5) < 0.7
    gradients = []
    for context in (torch.enable_grad, triton_bn.recompute):
        with context():
            loss = head(layer(x, mask=mask)).square().sum()
        gradients.append(torch.autograd.grad(loss, [x, *layer.parameters(), *head.parameters()]))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x.bfloat16(), mask=mask)
    assert y.dtype == torch.bfloat16
