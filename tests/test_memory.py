"""The watch over memory that all tests run under sees what it is there for."""

from __future__ import annotations

from typing import Any

import direct
import memory
import oracle
import pytest
import torch
import triton
import triton.language as tl

from triton_bn import launch
from triton_bn.plan import Plan, Tile

pytestmark = pytest.mark.skipif(not launch.interpreting(), reason="watches the interpreter")


@triton.jit
def copy_kernel(p_x, p_y, first, SIZE: tl.constexpr, HOLES: tl.constexpr):
    lane = first + tl.arange(0, SIZE)
    value = tl.load(p_x + lane, mask=lane % 2 == 0) if HOLES else tl.load(p_x + lane)
    tl.store(p_y + lane, value)


def run(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    launch.run(launch.Launch(kernel, 1, (), constants), (), arguments)


@pytest.mark.parametrize("first", [-1, 1])
def test_an_access_outside_of_all_tensors_raises(first: int) -> None:
    x = torch.zeros(8)
    with pytest.raises(memory.Stray, match="outside of all tensors"):
        run(copy_kernel, (x, torch.zeros(16), first), {"SIZE": 8, "HOLES": False})


def test_an_access_across_two_tensors_raises() -> None:
    both = torch.zeros(16)
    with pytest.raises(memory.Stray):
        run(copy_kernel, (both[:8], both[8:], 4), {"SIZE": 8, "HOLES": False})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_load_masks_off_is_nan(dtype: torch.dtype) -> None:
    x, y = torch.ones(8, dtype=dtype), torch.empty(8, dtype=dtype)
    run(copy_kernel, (x, y, 0), {"SIZE": 8, "HOLES": True})
    assert y[::2].eq(1).all()
    assert y[1::2].isnan().all()


@pytest.mark.parametrize("driver", ["split", "streamed"])
def test_no_partial_is_stored_for_a_channel_that_a_tile_does_not_touch(driver: str) -> None:
    """S = 12, K = 16: a tile has room for four channels and touches two or three.

    The others' partials would be stored before the buffer, or over another's.
    """
    torch.manual_seed(0)
    x, dy = torch.randn(2, 5, 7, 12).unbind()
    tile = Tile(2, 16, 1, 4, 2)
    plan = Plan(driver, tile, tile, window=1, programs=2)  # type: ignore[arg-type]
    expected = oracle.batch_norm(x, training=True, dy=dy, interpreted=True)
    with direct.poisoned():
        for name, value in direct.step(x, dy, plan).items():
            expected[name].assert_close(value, name)


def test_the_last_program_of_whole_channels_reads_no_others() -> None:
    """Tiles that hold four channels to the last value, and six channels: the last program has two."""
    torch.manual_seed(0)
    x, dy, residual = torch.randn(3, 3, 6, 4).unbind()
    plan = Plan("resident", Tile(2, 16, 2), channels=4)
    expected = oracle.batch_norm(x, training=True, dy=dy, residual=residual, interpreted=True)
    with direct.poisoned():
        for name, value in direct.step(x, dy, plan, residual=residual).items():
            expected[name].assert_close(value, name)
