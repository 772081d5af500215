"""What only a GPU can show: real concurrency, huge tensors, graphs, rounding. Skipped without one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import triton_bn
from triton_bn import launch, route
from triton_bn.plan import Device, Plan, candidates
from triton_bn.problem import Problem, describe

pytestmark = pytest.mark.gpu

SHAPE = (64, 24, 64, 64)


def streamed(x: torch.Tensor, direction: str) -> tuple[Problem, Plan]:
    """A problem, and the plan that the streamed driver would get were L2 too small for it."""
    problem, _ = describe(x, training=True)
    problem = replace(problem, direction=direction)
    small = replace(Device.current(x.device), cache=x.numel() * x.element_size() // 4)
    plans = [plan for plan in candidates(problem, small) if plan.driver == "streamed"]
    return problem, replace(plans[0], window=4)


def run_streamed(x: torch.Tensor, dy: torch.Tensor) -> list[torch.Tensor]:
    forward, backward = streamed(x, "forward"), streamed(x, "backward")
    weight = torch.full((x.shape[1],), 1.5, device=x.device)
    y, stats, _ = launch.forward(*forward, x, weight, weight, None, None, None, None, 0.1, 1e-5)
    needs = (True, True, True, False)
    gradients = launch.backward(*backward, dy, x, stats, weight, weight, None, None, needs)
    return [y, *(g for g in gradients if g is not None)]


@pytest.fixture
def tensors() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(SHAPE, device="cuda", dtype=torch.bfloat16)
    return x, torch.randn_like(x)


def test_thousands_of_streamed_launches_end_with_the_same_bits(
    tensors: tuple[torch.Tensor, torch.Tensor],
) -> None:
    expected = run_streamed(*tensors)
    for _ in range(3000):
        found = run_streamed(*tensors)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_streamed_launches_on_several_streams_do_not_wait_for_one_another(
    tensors: tuple[torch.Tensor, torch.Tensor],
) -> None:
    expected = run_streamed(*tensors)
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for _ in range(200):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(run_streamed(*tensors))
        results = results[-4:]
    torch.cuda.synchronize()
    for found in results:
        assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_streamed_launches_in_a_replayed_graph(tensors: tuple[torch.Tensor, torch.Tensor]) -> None:
    expected = run_streamed(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run_streamed(*tensors)
    for _ in range(1000):
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_more_values_than_int32_counts(last: bool) -> None:
    shape = (2, 8, 12_000, 12_000)
    if torch.cuda.get_device_properties(0).total_memory < 40 << 30:
        pytest.skip("needs 40 GiB")
    x = torch.empty(shape, device="cuda", dtype=torch.float16)
    x = x.to(memory_format=torch.channels_last) if last else x
    x.normal_()
    layer = triton_bn.BatchNorm2d(8, device="cuda", track_running_stats=False)
    with torch.no_grad():
        y = layer(x)
    for image, corner in ((0, (0, 0)), (1, (11_999, 11_999))):
        for channel in (0, 7):
            plane = x[:, channel]
            mean = plane.double().mean()
            std = (plane.double() - mean).square().mean().sqrt()
            expected = (x[image, channel][corner].double() - mean) / std
            assert abs(y[image, channel][corner].item() - expected.item()) < 4e-3


def test_bfloat16_rounds_to_nearest(device: torch.device) -> None:
    x = torch.randn(4096, 64, device=device, dtype=torch.bfloat16)
    layer = triton_bn.BatchNorm1d(64, device=device)
    exact = torch.nn.functional.batch_norm(x.double(), None, None, training=True)
    bias = (layer(x).double() - exact).mean() / exact.abs().mean()
    assert abs(bias.item()) < 2e-5  # truncation would shrink every value by 2e-3 in the mean


def test_a_tensor_on_another_than_the_current_gpu() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(8, 16, 7, 7, device="cuda:1")
    layer = triton_bn.BatchNorm2d(16, device="cuda:1")
    with torch.cuda.device(0):
        y = layer(x)
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True))


def test_the_kernels_ran_compiled(device: torch.device) -> None:
    assert not launch.interpreting()
    assert route.use_kernels(torch.empty(1, device=device))
