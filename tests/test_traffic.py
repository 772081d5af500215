"""Passes over memory as facts: the values that each kernel loads and stores, counted one by one."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import oracle
import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from traffic import Bytes, Traffic, metered

from triton_bn import launch
from triton_bn.functional import batch_norm
from triton_bn.plan import DEVICES, Plan, candidates, channel_blocks, tile_channels
from triton_bn.problem import Activation, Problem, canonical
from triton_bn.tuning.resolve import choosing

pytestmark = pytest.mark.skipif(not launch.interpreting(), reason="counts in the interpreter")

#: A GPU as much smaller as the tensors here are, so that every driver is a candidate.
SMALL = replace(DEVICES["H100"], processors=1, cache=1 << 10)

#: The tensors of the input's size.
WHOLE = ("x", "y", "dy", "dx", "residual", "dresidual")

#: Shape and layout: ragged rows and columns, S = 1, one channel in many blocks, many in one.
INPUTS = [
    ((6, 8, 7, 7), "contiguous"),
    ((5, 3, 50), "contiguous"),
    ((3, 3, 23, 29), "contiguous"),
    ((37, 5), "contiguous"),
    ((4, 24, 9, 5), "channels_last"),
    ((4, 6, 5, 5), "sliced_channels"),
]


def plans(problem: Problem) -> list[Plan]:
    """Two plans of each driver, as unlike as the candidates are; streamed in windows of two blocks."""
    by_driver: dict[str, list[Plan]] = {}
    for plan in candidates(problem, SMALL):
        if plan.driver == "streamed":
            plan = replace(plan, window=2, programs=3)
        by_driver.setdefault(plan.driver, []).append(plan)
    return [plan for found in by_driver.values() for plan in dict.fromkeys((found[0], found[-1]))]


def launched(
    x: Tensor,
    monkeypatch: pytest.MonkeyPatch,
    choice: int,
    *,
    training: bool = True,
    residual: bool = False,
    activation: str | None = None,
) -> dict[str, tuple[Plan, list[Traffic]]]:
    """Runs forward and backward under one of the :func:`plans`: plan and launches by direction."""
    chosen: dict[str, Plan] = {}

    def choose(problem: Problem, *_: Any) -> Plan:
        found = plans(problem)
        chosen[problem.direction] = found[choice % len(found)]
        return chosen[problem.direction]

    channels = x.shape[1]
    weight, bias = (
        torch.ones(channels, requires_grad=True),
        torch.zeros(channels, requires_grad=True),
    )
    running = torch.zeros(channels), torch.ones(channels)
    added = torch.ones_like(x, requires_grad=True) if residual else None
    with choosing(choose), metered() as launches:
        y = batch_norm(
            x.requires_grad_(),
            *running,
            weight,
            bias,
            training,
            residual=added,
            activation=activation,
        )
        forward = list(launches)
        y.backward(torch.ones_like(y))
    return {
        "forward": (chosen["forward"], forward),
        "backward": (chosen["backward"], launches[len(forward) :]),
    }


READS = {"resident": 1, "split": 2, "streamed": 2}


def assert_passes(x: Tensor, plan: Plan, launches: list[Traffic], expected: dict[str, int]) -> None:
    """How often each tensor of the input's size is read or written, over all launches.

    A launch that touches one touches all of it. Beyond whole passes, a program may read two values
    a channel again (its first, to which the moments are relative).
    """
    _, channels, inner = canonical(tuple(x.shape), x.stride())[0]  # type: ignore[index]
    size = x.numel() * x.element_size()
    found: dict[str, int] = {}
    for launch_ in launches:
        tile = plan.transform if plan.reduce is None or launch_ is launches[-1] else plan.reduce
        items = -(-channels * inner // tile.columns) * tile.splits
        if plan.driver == "resident":
            items = launch_.programs
        again = 2 * min(tile_channels(tile.columns, inner), channels) * items * x.element_size()
        for name, moved in [*launch_.loads.items(), *launch_.stores.items()]:
            if name in WHOLE:
                assert moved.distinct == size, (launch_.kernel, name)
                count, rest = divmod(moved.total, size)
                assert rest <= (again if name == "x" else 0), (launch_.kernel, name, rest, size)
                found[name] = found.get(name, 0) + count
            elif name == "partials" and "streamed" not in launch_.kernel:
                # Written once; all those of a channel are read by each program that touches it.
                parts = tile.splits * channel_blocks(tile.columns, inner)
                assert moved.distinct <= 8 * channels * parts
                assert moved.total <= 8 * channels * parts * (parts if name in launch_.loads else 1)
    assert found == expected
    assert len(launches) == (2 if plan.driver == "split" and plan.reduce else 1)


def packed_size(x: Tensor) -> int:
    """Bytes of one bit a value, each row of the canonical block padded to whole bytes."""
    outer, channels, inner = canonical(tuple(x.shape), x.stride())[0]  # type: ignore[index]
    return outer * -(-channels * inner // 8)


@pytest.mark.parametrize("choice", range(6))
@pytest.mark.parametrize(("shape", "layout"), INPUTS)
def test_passes_of_every_driver(
    shape: tuple[int, ...], layout: str, choice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Resident: 2 forward, 3 backward. Split: 3 and 5. Streamed asks for as much, in one launch."""
    x = oracle.arrange(torch.randn(shape), layout)
    found = launched(x, monkeypatch, choice)
    plan, forward = found["forward"]
    assert_passes(x, plan, forward, {"x": READS[plan.driver], "y": 1})
    plan, backward = found["backward"]
    reads = READS[plan.driver]
    assert_passes(x, plan, backward, {"x": reads, "dy": reads, "dx": 1})


@pytest.mark.parametrize("choice", range(6))
@pytest.mark.parametrize(("shape", "layout"), [INPUTS[0], INPUTS[2], INPUTS[4]])
def test_a_residual_costs_one_read_and_the_slope_y_or_a_bit_a_value(
    shape: tuple[int, ...], layout: str, choice: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = oracle.arrange(torch.randn(shape), layout)
    found = launched(x, monkeypatch, choice, residual=True, activation="relu")
    plan, forward = found["forward"]
    assert_passes(x, plan, forward, {"x": READS[plan.driver], "y": 1, "residual": 1})
    plan, backward = found["backward"]
    reads = READS[plan.driver]
    each = {"x": reads, "dy": reads, "dx": 1, "dresidual": 1}
    assert_passes(x, plan, backward, {**each, "residual": reads})  # y, in its place
    found = launched(
        x, monkeypatch, choice, residual=True, activation=Activation("leaky_relu", -0.5)
    )
    plan, forward = found["forward"]
    assert_passes(x, plan, forward, {"x": READS[plan.driver], "y": 1, "residual": 1})
    bits = packed_size(x)
    assert forward[-1].stores["bits"] == Bytes(bits, bits)
    plan, backward = found["backward"]
    reads = READS[plan.driver]
    assert_passes(x, plan, backward, {"x": reads, "dy": reads, "dx": 1, "dresidual": 1})
    assert sum(launch_.loads["bits"].total for launch_ in backward) == reads * bits


@pytest.mark.parametrize(("shape", "layout"), [INPUTS[0], INPUTS[4]])
def test_an_activation_alone_adds_nothing(
    shape: tuple[int, ...], layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = oracle.arrange(torch.randn(shape), layout)
    found = launched(x, monkeypatch, 2, activation="silu")
    plan, forward = found["forward"]
    assert_passes(x, plan, forward, {"x": READS[plan.driver], "y": 1})
    plan, backward = found["backward"]
    reads = READS[plan.driver]
    assert_passes(x, plan, backward, {"x": reads, "dy": reads, "dx": 1})


def test_evaluation_reads_once_and_writes_once(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(5, 3, 50)
    plan, forward = launched(x, monkeypatch, 0, training=False)["forward"]
    assert_passes(x, plan, forward, {"x": 1, "y": 1})


@triton.jit
def half_read_twice(p_x, COUNT: tl.constexpr):
    lane = tl.arange(0, COUNT)
    for _ in range(2):
        tl.load(p_x + lane, mask=lane < COUNT // 2, other=0.0)


def test_the_meter_counts_every_value_once_and_none_that_is_masked_off() -> None:
    """A kernel that reads a row twice, with half of its lanes masked."""
    with metered() as launches:
        launch.run(launch.Launch(half_read_twice, 1, (), {"COUNT": 8}), (), (torch.arange(16.0),))
    assert launches[0].loads == {"x": Bytes(32, 16)}
    assert launches[0].stores == {}
