"""Offsets beyond 2**31 values: the kernels with 64-bit offsets, on memory that is hardly ever touched.

A tensor of 2**31 values takes no memory but for the pages that are written. Rows lie far apart by the input's
strides; of a row that is itself so long, only the programs that hold the first, the middle and the last of its
columns are run, and only their channels are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import direct
import memory
import oracle
import pytest
import torch
from torch import Tensor

from triton_bn import launch
from triton_bn.plan import Plan, Tile
from triton_bn.problem import describe

pytestmark = pytest.mark.skipif(
    not launch.interpreting(), reason="the interpreter's memory is lazy"
)

FAR = 2**31


def reserve(*sizes: int) -> Tensor:
    """A float16 tensor without a page; the test is skipped where the system promises no memory."""
    try:
        return torch.empty(sizes, dtype=torch.float16)
    except RuntimeError as error:
        pytest.skip(str(error))


TILE = Tile(2, 32, 1, 1, 2)
PLANS = {
    "split": Plan("split", TILE, TILE),
    "streamed": Plan("streamed", TILE, TILE, window=2, programs=2),
    "resident": Plan("resident", Tile(2, 128, 2, 4), channels=8),
}


@pytest.mark.parametrize("far", ["rows", "channels"])
@pytest.mark.parametrize("driver", PLANS)
def test_values_that_lie_far_apart(driver: str, far: str) -> None:
    """Where rows, or channels, of the input lie so far apart that the last are beyond 2**31 values."""
    torch.manual_seed(0)
    shape = (3, 8, 16)
    strides = (FAR // 2, 16, 1) if far == "rows" else (16, FAR // 4, 1)
    plan = PLANS[driver]
    if far == "channels" and driver == "resident":  # all rows of a channel are one
        plan = Plan("resident", Tile(1, 512, 1, 4), channels=8)
    x = reserve(1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True)))
    x = x.as_strided(shape, strides).copy_(torch.randn(shape))
    assert describe(x, training=True)[0].wide
    dy, residual = torch.randn(2, *shape).half().unbind()
    given = {name: torch.rand(8) + 0.5 for name in ("weight", "bias")}
    running = {name: torch.rand(8) for name in ("running_mean", "running_var")}
    expected = oracle.batch_norm(
        x.clone(memory_format=torch.contiguous_format), *running.values(), *given.values(), True,
        residual=residual, activation="relu", dy=dy, interpreted=True,
    )  # fmt: skip
    found = direct.step(x, dy, plan, **given, **running, residual=residual, activation="relu")
    for name, value in found.items():
        expected[name].assert_close(value, name)


#: Channels of 8 values in one row of a little more than 2**31, in tiles of two.
CHANNELS, INNER = FAR // 8 + 6, 8
#: The programs that are run, of two channels each: the first, the one at column 2**31, the last.
PROGRAMS = (0, FAR // 16, CHANNELS // 2 - 1)


@contextmanager
def some_programs() -> Iterator[None]:
    """Meanwhile only those: a second launch of split numbers them from the end."""

    def loop(launch: memory.Launch, program: Callable[[int], None]) -> None:
        assert launch.programs == CHANNELS // 2
        for i in sorted({*PROGRAMS, *(launch.programs - 1 - i for i in PROGRAMS)}):
            program(i)

    with memory.looped(loop):
        yield


@pytest.mark.parametrize("driver", ["split", "resident"])
def test_a_row_of_more_than_2_to_the_31_values(driver: str) -> None:
    """The row's length, the columns' positions and the partials' must not be computed in 32 bits."""
    torch.manual_seed(0)
    tile = Tile(1, 16, 1, 1)
    plan = Plan(driver, tile, tile if driver == "split" else None, channels=2)  # type: ignore[arg-type]
    x, dy, residual = (reserve(1, CHANNELS, INNER) for _ in range(3))
    seen = torch.tensor([2 * i + k for i in PROGRAMS for k in range(2)])
    mirrored = torch.cat([seen, CHANNELS - 1 - seen]).unique()
    names = ("weight", "bias", "running_mean", "running_var")
    given = {name: torch.empty(CHANNELS) for name in names}
    for tensor in (x, dy, residual):
        tensor[:, mirrored] = torch.randn(1, len(mirrored), INNER).half()
    for tensor in given.values():
        tensor[mirrored] = torch.rand(len(mirrored)) + 0.5
    few = {name: tensor[seen] for name, tensor in given.items()}
    expected = oracle.batch_norm(
        x[:, seen], few["running_mean"], few["running_var"], few["weight"], few["bias"], True,
        residual=residual[:, seen], activation="relu", dy=dy[:, seen], interpreted=True,
    )  # fmt: skip
    with some_programs():
        found = direct.step(x, dy, plan, **given, residual=residual, activation="relu")
    for name, value in found.items():
        part = value[seen] if value.dim() == 1 else value[:, seen]
        expected[name].assert_close(part, name)
