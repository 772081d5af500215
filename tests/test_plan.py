"""Plans are pure functions of a problem and a device's facts; what they promise to every launch."""

from __future__ import annotations

import json
from dataclasses import replace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings

from perf.shapes import EXTREMES, NETWORKS
from triton_bn.inspection.report import gradient_of
from triton_bn.plan import (
    DEPTH,
    DEVICES,
    MEMBERS,
    RESIDENT,
    SHARED,
    Device,
    Plan,
    Tile,
    candidates,
    channel_blocks,
    heuristic,
    power_of_two,
    tile_channels,
)
from triton_bn.problem import Activation, Problem, describe

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

sizes = st.one_of(
    st.integers(1, 70), st.sampled_from([96, 196, 300, 784, 1024, 3136, 12544, 50176])
)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    outer, channels, inner = draw(sizes), draw(sizes), draw(sizes)
    if draw(st.booleans()):  # channels_last
        outer, inner = outer * inner, 1
    dtype = draw(st.sampled_from(DTYPES))
    row = channels * inner
    stride = row * draw(st.sampled_from([1, 1, 2]))
    vector = 16 // dtype.itemsize
    while outer > 1 and (row % vector or stride % vector):
        vector //= 2
    training = draw(st.booleans())
    activation = draw(st.sampled_from([None, Activation("relu"), Activation("gelu")]))
    residual = draw(st.booleans())
    bits = activation == Activation("relu") and (residual or not training) and draw(st.booleans())
    forward = Problem(
        "forward", outer, channels, inner, (stride, inner, 1), dtype, vector,
        training, activation, residual, bits, training and draw(st.booleans()),
    )  # fmt: skip
    return forward if draw(st.booleans()) else gradient_of(forward)


devices = st.sampled_from(list(DEVICES.values()))


def is_power_of_two(n: int) -> bool:
    return n >= 1 and n & (n - 1) == 0


def check_tile(tile: Tile, problem: Problem) -> None:
    assert is_power_of_two(tile.rows)
    assert is_power_of_two(tile.columns)
    assert is_power_of_two(tile.warps)
    assert tile.warps <= 16
    assert 1 <= tile.depth <= DEPTH
    assert tile.splits >= 1
    assert tile.stages >= 1
    assert tile.columns >= 8 or not problem.bits, "a byte of bits would be shared"


def check(plan: Plan, problem: Problem, device: Device) -> None:
    """What a launch takes for granted."""
    check_tile(plan.transform, problem)
    if plan.reduce is not None:
        check_tile(plan.reduce, problem)
    tile = plan.transform
    if plan.driver == "resident":
        assert problem.training, "running statistics are not computed from x"
        assert not problem.cumulative, "the counter would have to advance before the launch"
        assert plan.reduce is None
        assert tile.splits == tile.stages == 1, "one chunk of rows"
        assert 1 <= plan.channels <= problem.channels
        assert plan.channels * problem.inner <= tile.columns, "whole channels"
        assert problem.outer <= tile.rows * tile.depth, "all rows"
        limit = RESIDENT[problem.direction] // (2 if problem.dtype == torch.float64 else 1)
        assert tile.rows * tile.depth * tile.columns <= limit
        programs = -(-problem.channels // plan.channels)
        if problem.bits and programs > 1:
            assert plan.channels * problem.inner % 8 == 0, "programs would share a byte of bits"
        return
    sums = problem.training or problem.direction == "backward"
    assert (plan.reduce is not None) == sums
    for each in {plan.transform, plan.reduce} - {None}:
        members = each.columns * power_of_two(tile_channels(each.columns, problem.inner))
        assert problem.inner == 1 or each.columns == 8 or members <= MEMBERS * each.warps
        chunk = each.rows * each.depth
        rows = -(-problem.outer // (each.splits * chunk)) * chunk  # of a split, as launched
        assert (each.splits - 1) * rows < problem.outer, "a split without rows"
        copied = (each.stages - 1) * each.rows * each.depth * each.columns * problem.itemsize
        tensors = 1 + (problem.direction == "backward") + problem.residual
        assert tensors * copied <= SHARED, "more shared memory than a program may have"
        assert each.stages == 1 or device.arch.startswith("sm_"), "changes nothing on AMD"
    if plan.driver == "streamed":
        assert device.arch.startswith("sm_"), "measured and understood on NVIDIA only"
        assert problem.training
        assert not problem.cumulative
        assert plan.reduce == plan.transform
        assert plan.window >= 1
        assert plan.programs >= device.processors
        # Between the two reads of a value lie the windows that its channel reaches ahead, one before them
        # and one behind: no more than L2 still holds.
        reach = tile.columns * (channel_blocks(tile.columns, problem.inner) - 1)
        ahead = max(-(-reach // (plan.window * tile.columns)), 1)
        between = (ahead + 2) * plan.window * tile.columns * problem.outer * problem.itemsize
        assert between * (1 if problem.direction == "forward" else 2) <= 36 << 20


#: Wide values in few rows: a tile of few columns must still hold whole bytes of bits.
NARROW = Problem(
    "backward", 50, 24, 1, (24, 1, 1), torch.float64, 2, True, Activation("relu"), False, True
)  # fmt: skip


#: Channels of 6 MB and of 128 MB: larger than a streamed window, and than what L2 holds.
STEM, LARGE = (
    Problem("backward", outer, 64, inner, (64 * inner, inner, 1), torch.bfloat16, 8)
    for outer, inner in ((256, 12544), (1024, 65536))
)


def test_a_channel_of_several_windows_may_stream_unless_l2_loses_it() -> None:
    assert any(plan.driver == "streamed" for plan in candidates(STEM, DEVICES["H100"]))
    assert not any(plan.driver == "streamed" for plan in candidates(LARGE, DEVICES["H100"]))


@settings(max_examples=150)
@given(problems(), devices)
@example(NARROW, DEVICES["H100"])
@example(STEM, DEVICES["H100"])
@example(STEM, DEVICES["B200"])
@example(LARGE, DEVICES["H100"])
@example(replace(STEM, direction="forward"), DEVICES["A100"])
@example(replace(STEM, direction="forward", cumulative=True), DEVICES["H100"])
@example(Problem("forward", 3136, 64, 1, (64, 1, 1), torch.float64, 2), DEVICES["H100"])
def test_every_candidate_is_legal(problem: Problem, device: Device) -> None:
    found = candidates(problem, device)
    assert found[0] == heuristic(problem, device)
    assert len(set(found)) == len(found)
    for plan in found:
        check(plan, problem, device)


@settings(max_examples=50)
@given(problems(), devices)
def test_plans_are_deterministic(problem: Problem, device: Device) -> None:
    again = replace(problem, strides=tuple(problem.strides))
    assert candidates(problem, device) == candidates(again, replace(device))


@settings(max_examples=50)
@given(problems(), devices)
def test_a_plan_survives_json(problem: Problem, device: Device) -> None:
    for plan in candidates(problem, device):
        data = json.loads(json.dumps(plan.as_dict()))
        again = Plan.from_dict(data, source="file")
        assert again == plan
        assert again.source == "file"
        assert hash(again) == hash(plan)


def test_a_plan_of_before_there_were_stages_has_one() -> None:
    """Files and tables may be older than the field."""
    problem = described((256, 64, 56, 56), False, torch.bfloat16)[0]
    plan = heuristic(problem, DEVICES["H100"])
    assert plan.transform.stages == 2
    data = plan.as_dict()
    for tile in (data["transform"], data["reduce"]):
        del tile["stages"]
    assert Plan.from_dict(data, source="file").transform == replace(plan.transform, stages=1)


@pytest.mark.parametrize(
    "data", [{}, {"driver": "split"}, {"driver": "split", "transform": {}, "reduce": None}]
)
def test_what_is_no_plan_is_refused(data: dict[str, object]) -> None:
    with pytest.raises((TypeError, KeyError)):
        Plan.from_dict(data, source="file")


def layers() -> list[tuple[int, ...]]:
    return [
        (batch, layer.channels, *layer.spatial)
        for layers in NETWORKS.values()
        for layer in layers
        for batch in (1, 32, 256)
    ] + list(EXTREMES.values())


def described(shape: tuple[int, ...], last: bool, dtype: torch.dtype) -> list[Problem]:
    """Forward and backward; with channels_last where the shape has one."""
    x = torch.empty(shape, dtype=dtype, device="meta")
    if last and len(shape) > 3:
        x = x.to(memory_format=torch.channels_last if len(shape) == 4 else torch.channels_last_3d)
    forward, _ = describe(x, training=True)
    return [forward, gradient_of(forward)]


@pytest.mark.parametrize("name", ["A100", "H100", "B200", "MI300X"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_networks_fill_the_gpu(name: str, last: bool) -> None:
    """With 16 KB of input for each processor and more, eight in nine of up to 148 have a program with rows."""
    device = DEVICES[name]
    bad = []
    for shape in layers():
        for problem in described(shape, last, torch.bfloat16):
            plan = heuristic(problem, device)
            if problem.numel * problem.itemsize < device.processors * 16 << 10:
                continue
            if plan.driver == "resident":
                programs = -(-problem.channels // plan.channels)
            else:
                programs = min(
                    -(-problem.row // tile.columns) * tile.splits
                    for tile in (plan.transform, plan.reduce)
                    if tile is not None
                )
            if 9 * programs < 8 * min(device.processors, 148):
                bad.append(f"{problem}: {plan}: {programs} programs")
    assert not bad, f"{len(bad)}:\n" + "\n".join(bad)


def partials(problem: Problem, tile: Tile, power: int) -> int:
    """Bytes of all partials (power 1), or of all that programs of the same tile read of them (2)."""
    first = torch.arange(problem.channels) * problem.inner
    blocks = (first + problem.inner - 1) // tile.columns - first // tile.columns + 1
    return int(8 * (blocks * tile.splits).pow(power).sum())


@pytest.mark.parametrize("name", ["A100", "H100", "B200", "MI300X"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
def test_partials_are_little_beside_the_input(name: str, last: bool) -> None:
    """Split, where each processor has work: at most a tenth of the input is written as partials.

    Every program of the second launch reads those of its channels again, mostly from L2: at most
    half of the input in all.
    """
    device = DEVICES[name]
    bad = []
    for shape in layers():
        for problem in described(shape, last, torch.bfloat16):
            plan = heuristic(problem, device)
            size = problem.numel * problem.itemsize
            if plan.reduce is None or size < device.processors * 16 << 10:
                continue
            written = partials(problem, plan.reduce, 1)
            again = partials(problem, plan.reduce, 2)
            if written > size / 10 or again > size / 2:
                bad.append(f"{problem}: {plan}: {written / size:.2f}, {again / size:.2f}")
    assert not bad, f"{len(bad)}:\n" + "\n".join(bad)


@pytest.mark.parametrize("direction", ["forward", "backward"])
def test_cumulative_problems_are_never_resident(direction: str) -> None:
    x = torch.empty(32, 64, 7, 7, device="meta")
    problem = describe(x, training=True, cumulative=True)[0]
    for device in DEVICES.values():
        assert {plan.driver for plan in candidates(problem, device)} == {"split"}
        assert any(
            plan.driver == "resident"
            for plan in candidates(replace(problem, direction=direction, cumulative=False), device)
        )
