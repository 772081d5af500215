"""No schedule can make the kernels wrong: programs interleaved, races by happens-before, deadlocks.

Of each driver that shares work between programs, over small geometries. The controls show what would be seen:
the same kernels without a wait, a barrier, an acquire or a release.
"""

from __future__ import annotations

import contextlib

import direct
import oracle
import pytest
import torch
import triton
import triton.language as tl
from interleave import Deadlock, interleaved

from triton_bn import launch
from triton_bn.kernels import streamed
from triton_bn.plan import Plan, Tile

pytestmark = pytest.mark.skipif(not launch.interpreting(), reason="interleaves the interpreter")

#: Shape, columns of a tile, splits, and blocks of a window: channels within a block, across windows, many a
#: block, S = 1, and one window for all.
GEOMETRIES = {
    "a channel of several windows": ((2, 2, 20), 8, 1, 1),
    "windows that share channels": ((4, 3, 12), 16, 2, 2),
    "many channels a block": ((4, 11, 3), 16, 2, 1),
    "S = 1": ((4, 24), 8, 2, 1),
    "one window": ((4, 3, 7), 8, 2, 9),
}


def train(name: str, driver: str = "streamed", programs: int = 4) -> None:
    """A training step with a residual, held against the oracle."""
    shape, columns, splits, window = GEOMETRIES[name]
    torch.manual_seed(0)
    x, dy, residual = torch.randn(3, *shape).unbind()
    given = {name: torch.rand(shape[1]) + 0.5 for name in ("weight", "bias")}
    running = {name: torch.rand(shape[1]) for name in ("running_mean", "running_var")}
    expected = oracle.batch_norm(
        x, *running.values(), *given.values(), True, residual=residual, activation="relu",
        dy=dy, interpreted=True,
    )  # fmt: skip
    tile = Tile(2, columns, 1, 4, splits)
    plan = Plan(driver, tile, tile, window=window, programs=programs)  # type: ignore[arg-type]
    with direct.poisoned():
        found = direct.step(x, dy, plan, **given, **running, residual=residual, activation="relu")
    for result, value in found.items():
        expected[result].assert_close(value, result)


@pytest.mark.parametrize("driver", ["split", "streamed"])
@pytest.mark.parametrize("name", GEOMETRIES)
def test_no_schedule_makes_a_race(name: str, driver: str) -> None:
    with interleaved(seed=len(name)) as log:
        train(name, driver)
    assert not log.races
    assert log.switches > 50, "nothing was interleaved"


@pytest.mark.parametrize("resident", [1, 2])
def test_few_programs_at_a_time_do_not_deadlock(resident: int) -> None:
    with interleaved(seed=3, resident=resident) as log:
        train("a channel of several windows")
    assert not log.races


@triton.jit
def publish_without_barrier(p_counters, i_window):
    tl.atomic_add(p_counters + 1 + i_window, 1, sem="acq_rel")


@triton.jit
def publish_without_release(p_counters, i_window):
    tl.debug_barrier()
    tl.atomic_add(p_counters + 1 + i_window, 1, sem="acquire")


@triton.jit
def await_nothing(p_counters, i_block, n_blocks, sizes, splits, window, T: tl.constexpr):
    tl.debug_barrier()


@triton.jit
def await_one_window(p_counters, i_block, n_blocks, sizes, splits, window, T: tl.constexpr):
    """Of those that the block's channels touch, its own alone."""
    w = i_block // window
    items = tl.minimum(window, n_blocks - w * window) * splits
    while tl.atomic_add(p_counters + 1 + w, 0, sem="acquire") < items:
        pass
    tl.debug_barrier()


@triton.jit
def await_without_acquire(p_counters, i_block, n_blocks, sizes, splits, window, T: tl.constexpr):
    last = tl.cdiv(n_blocks, window)
    for w in range(last):
        items = tl.minimum(window, n_blocks - w * window) * splits
        while tl.atomic_add(p_counters + 1 + w, 0, sem="relaxed") < items:
            pass
    tl.debug_barrier()


@triton.jit
def await_without_barrier(p_counters, i_block, n_blocks, sizes, splits, window, T: tl.constexpr):
    last = tl.cdiv(n_blocks, window)
    for w in range(last):
        items = tl.minimum(window, n_blocks - w * window) * splits
        while tl.atomic_add(p_counters + 1 + w, 0, sem="acquire") < items:
            pass


@triton.jit
def await_too_much(p_counters, i_block, n_blocks, sizes, splits, window, T: tl.constexpr):
    while tl.atomic_add(p_counters + 1, 0, sem="acquire") < window * splits + 1:
        pass


@pytest.mark.parametrize(
    ("function", "without"),
    [
        ("publish_item", publish_without_barrier),
        ("publish_item", publish_without_release),
        ("await_windows", await_nothing),
        ("await_windows", await_one_window),
        ("await_windows", await_without_acquire),
        ("await_windows", await_without_barrier),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_missing_wait_barrier_acquire_or_release_is_seen(
    function: str, without: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever came out: all but the waits give right numbers in the interpreter."""
    name = "a channel of several windows"
    if without is await_without_acquire or without is await_without_barrier:
        name = "one window"  # they wait for all windows
    monkeypatch.setattr(streamed, function, without)
    with interleaved(seed=1) as log, contextlib.suppress(AssertionError):
        train(name)
    assert {race[1:] for race in log.races} >= {("partials", "store-load")}


def test_a_deadlock_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streamed, "await_windows", await_too_much)
    with pytest.raises(Deadlock), interleaved():
        train("one window")


@triton.jit
def count_kernel(p_count):
    tl.store(p_count, tl.load(p_count) + 1)


def test_an_update_that_is_no_atomic_is_a_race() -> None:
    with interleaved() as log:
        launch.run(launch.Launch(count_kernel, 3, (), {}), (), (torch.zeros(1, dtype=torch.int32),))
    assert log.races
