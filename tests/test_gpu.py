"""What only a GPU can show: real concurrency, huge tensors, graphs, rounding. Skipped without one.

Most telling first, and each a second or two: kernels are compiled once, then launched again and again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import direct
import pytest
import torch
from torch import Tensor

import triton_bn
from triton_bn import launch, route
from triton_bn.plan import Device, Plan, candidates
from triton_bn.problem import Activation, describe

pytestmark = pytest.mark.gpu

SHAPE = (64, 24, 64, 64)
#: Layout, activation, residual: the kinds of launch that differ in what they load and store.
KINDS = {
    "contiguous": (torch.contiguous_format, None, False),
    "channels_last": (torch.channels_last, "relu", False),
    "contiguous with bits": (torch.contiguous_format, "relu", True),
    "channels_last with bits": (torch.channels_last, "relu", True),
}


def plans(x: Tensor, activation: str | None, residual: bool) -> Iterator[tuple[Plan, Plan]]:
    """A plan of each driver, forward and backward; streamed with the tiles of split, whatever L2 holds."""
    device = Device.current(x.device)
    kinds: dict[str, Any] = {
        "training": True, "activation": Activation.of(activation), "residual": residual,
        "bits": residual and activation is not None,
    }  # fmt: skip
    forward, _ = describe(x, **kinds)
    kinds["residual"] = False
    backward, _ = describe(x, direction="backward", **kinds)
    found: dict[str, list[Plan]] = {}
    for problem in (forward, backward):
        for plan in reversed(candidates(problem, device)):
            if plan.driver == "split":
                tile, programs = plan.transform, 4 * device.processors
                streamed = Plan("streamed", tile, tile, window=4, programs=programs)
                found.setdefault(f"streamed {problem.direction}", []).append(streamed)
            if plan.driver != "streamed":
                found.setdefault(f"{plan.driver} {problem.direction}", []).append(plan)
    for driver in ("resident", "split", "streamed"):
        both = [found.get(f"{driver} {way}") for way in ("forward", "backward")]
        if both[0] and both[1]:
            yield both[0][-1], both[1][-1]  # the candidates that come first


def steps(
    shape: tuple[int, ...], layout: torch.memory_format, activation: str | None, residual: bool
) -> dict[str, Callable[[], list[Tensor]]]:
    """By driver: a training step on tensors that stay, as often as it is called."""
    generator = torch.Generator("cuda").manual_seed(0)

    def random() -> Tensor:
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)
        return x.contiguous(memory_format=layout)

    x, dy, added = random(), random(), random()
    weight = torch.rand(shape[1], device="cuda", generator=generator) + 0.5

    def step(forward: Plan, backward: Plan) -> list[Tensor]:
        found = direct.step(
            x, dy, forward, backward, weight=weight, bias=weight,
            residual=added if residual else None, activation=activation,
        )  # fmt: skip
        return [*found.values()]

    return {
        forward.driver: lambda forward=forward, backward=backward: step(forward, backward)
        for forward, backward in plans(x, activation, residual)
    }


def same(expected: list[Tensor], found: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.fixture
def streamed() -> Callable[[], list[Tensor]]:
    return steps(SHAPE, torch.contiguous_format, None, False)["streamed"]


def test_the_kernels_ran_compiled(device: torch.device) -> None:
    assert not launch.interpreting()
    assert route.on_gpu(torch.empty(1, device=device))


def test_thousands_of_streamed_launches_end_with_the_same_bits(
    streamed: Callable[[], list[Tensor]],
) -> None:
    expected = streamed()
    for number in range(3000):
        found = streamed()
        if number % 100 == 0:
            assert same(expected, found)
    assert same(expected, found)


def test_streamed_launches_on_several_streams_do_not_wait_for_one_another(
    streamed: Callable[[], list[Tensor]],
) -> None:
    expected = streamed()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results: list[list[Tensor]] = []
    for _ in range(200):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(streamed())
        results = results[-4:]
    torch.cuda.synchronize()
    assert all(same(expected, found) for found in results)


def test_streamed_launches_in_a_replayed_graph(streamed: Callable[[], list[Tensor]]) -> None:
    expected = streamed()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = streamed()
    for number in range(1000):
        graph.replay()
        if number % 100 == 0:
            assert same(expected, found)
    assert same(expected, found)


@pytest.mark.parametrize("kind", KINDS)
def test_every_driver_gives_the_same_bits_again_whatever_else_the_gpu_does(kind: str) -> None:
    """Sums are in a fixed order: neither when programs run nor beside whom may change a bit."""
    layout, activation, residual = KINDS[kind]
    square = torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16)
    other = torch.cuda.Stream()
    drivers: set[str] = set()
    for shape in ((32, 48, 7, 7), (16, 24, 33, 29)):
        for driver, step in steps(shape, layout, activation, residual).items():
            expected = step()
            torch.cuda.synchronize()
            for _ in range(40):
                with torch.cuda.stream(other):
                    square @ square
                assert same(expected, step()), (driver, shape)
            drivers.add(driver)
    assert drivers >= {"split", "streamed"} | ({"resident"} if "contiguous" in kind else set())


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_step_in_a_replayed_graph_is_the_eager_one(kind: str) -> None:
    layout, activation, residual = KINDS[kind]
    torch.manual_seed(0)
    x, dy, added = (
        torch.randn(16, 24, 14, 14, device="cuda").contiguous(memory_format=layout)
        for _ in range(3)
    )
    layers = [
        triton_bn.BatchNorm2d(24, activation=activation, device="cuda").train() for _ in range(2)
    ]

    def step(layer: Any) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = layer(leaf, added if residual else None)
        return [y.detach(), *torch.autograd.grad(y, [leaf, layer.weight, layer.bias], dy)]

    warm = torch.cuda.Stream()
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        for layer in layers:
            step(layer)
    torch.cuda.current_stream().wait_stream(warm)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(layers[0])
    for _ in range(3):
        x.normal_()
        graph.replay()
        assert same(step(layers[1]), found)
    for mine, eager in zip(layers[0].buffers(), layers[1].buffers(), strict=True):
        assert torch.equal(mine, eager), "each replay must count, and advance what runs"


def test_layers_on_several_streams_do_not_disturb_one_another() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(32, 48, 28, 28, device="cuda") for _ in range(4)]
    layer = triton_bn.BatchNorm2d(48, activation="relu", device="cuda", track_running_stats=False)

    def step(x: Tensor) -> list[Tensor]:
        leaf = x.detach().requires_grad_()
        y = layer(leaf)
        return [y.detach(), *torch.autograd.grad(y, [leaf, layer.weight, layer.bias], x)]

    expected = [step(x) for x in inputs]
    torch.cuda.synchronize()
    streams, found = [torch.cuda.Stream() for _ in inputs], expected
    for _ in range(50):
        found = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(step(x))
    torch.cuda.synchronize()
    assert all(same(a, b) for a, b in zip(expected, found, strict=True))


def test_more_values_than_int32_counts() -> None:
    """Both layouts, forward and backward, one after the other: each takes some 20 GiB."""
    if torch.cuda.get_device_properties(0).total_memory < 70 << 30:
        pytest.skip("needs 70 GiB")
    shape, last = (2, 8, 12_000, 12_000), 11_999
    layer = triton_bn.BatchNorm2d(8, device="cuda", track_running_stats=False)
    for layout in (torch.contiguous_format, torch.channels_last):
        x, dy = (
            torch.empty(shape, device="cuda", dtype=torch.float16, memory_format=layout).normal_()
            for _ in range(2)
        )
        leaf = x.requires_grad_()
        y = layer(leaf)
        (dx,) = torch.autograd.grad(y, [leaf], dy)
        y, x = y.detach(), x.detach()
        for channel in (0, 7):
            plane, slope = x[:, channel].double(), dy[:, channel].double()
            mean = plane.mean()
            plane -= mean
            invstd = 1 / (plane.square().mean() + layer.eps).sqrt()
            sum_g, sum_gx = slope.mean(), (slope * plane).mean() * invstd
            for place in ((0, 0, 0), (1, last, last)):
                xhat = plane[place] * invstd
                assert abs(y[:, channel][place].item() - xhat.item()) < 4e-3
                expected = invstd * (slope[place] - sum_g - xhat * sum_gx)
                assert abs(dx[:, channel][place].item() - expected.item()) < 4e-3
            del plane, slope
        del x, leaf, y, dy, dx
        torch.cuda.empty_cache()


def test_bfloat16_rounds_to_nearest(device: torch.device) -> None:
    torch.manual_seed(0)
    x, dy = (torch.randn(4096, 64, device=device, dtype=torch.bfloat16) for _ in range(2))
    layer = triton_bn.BatchNorm1d(64, device=device)
    leaf, exact_leaf = x.requires_grad_(), x.detach().double().requires_grad_()
    y, exact = layer(leaf), torch.nn.functional.batch_norm(exact_leaf, None, None, training=True)
    (dx,), (exact_dx,) = (
        torch.autograd.grad(out, [into], slope)
        for out, into, slope in ((y, leaf, dy), (exact, exact_leaf, dy.double()))
    )
    for found, expected in ((y, exact), (dx, exact_dx)):
        # Truncation would get half of all values wrong, and shrink them by 2e-3 in the mean; rounding
        # to nearest differs where float32 and float64 lie on two sides of a middle.
        wrong = (found != expected.bfloat16()).double().mean()
        assert wrong.item() < 5e-3
        bias = ((found.double() - expected) * expected.sign()).mean() / expected.abs().mean()
        assert abs(bias.item()) < 2e-5


def test_a_nan_passes_through_relu(device: torch.device) -> None:
    x = torch.randn(64, 16, 7, 7, device=device, dtype=torch.bfloat16)
    x[3, 5, 2, 2] = torch.nan
    for layout in (torch.contiguous_format, torch.channels_last):
        layer = triton_bn.BatchNorm2d(16, activation="relu", device=device)
        wrong = layer(x.contiguous(memory_format=layout)).isnan().sum((0, 2, 3))
        assert wrong.nonzero().flatten().tolist() == [5]
        assert wrong[5].item() == 64 * 49


def test_a_tensor_on_another_than_the_current_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(8, 16, 7, 7, device="cuda:1")
    layer = triton_bn.BatchNorm2d(16, device="cuda:1")
    with torch.cuda.device(0):
        y = layer(x)
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True))
