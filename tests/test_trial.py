"""What a search does not believe: results of trials on real kernels, right ones and broken ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from triton_bn import launch
from triton_bn.plan import Device, Plan, candidates, heuristic
from triton_bn.problem import Activation, Problem
from triton_bn.tuning import search, trial

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() or launch.interpreting()), reason="no GPU, and no interpreter"
)


def problem(direction: str = "forward", **changes: Any) -> Problem:
    options = {"dtype": torch.float32, "vector": 1, **changes}
    return Problem(direction, 6, 5, 14, (70, 14, 1), **options)  # type: ignore[arg-type]


RELU = Activation("relu")
PROBLEMS = {
    "forward": problem(activation=Activation("silu"), residual=True),
    "half": problem(dtype=torch.float16),
    "bits": problem(activation=RELU, residual=True, bits=True, dtype=torch.bfloat16),
    "cumulative": problem(cumulative=True),
    "evaluation": problem(training=False, activation=Activation("leaky_relu", 0.3), bits=True),
    "vectors": Problem("forward", 9, 24, 1, (24, 1, 1), torch.float32, 4),
    "sliced": Problem("forward", 6, 5, 14, (210, 14, 1), torch.float64, 1),
    "backward": problem("backward", activation=Activation("gelu"), residual=True),
    "backward bits": problem("backward", activation=RELU, bits=True, dtype=torch.float16),
    "backward output": problem(
        "backward", activation=Activation("relu6"), output=True, dtype=torch.bfloat16
    ),
    "backward evaluation": problem("backward", training=False, activation=Activation("relu6")),
}


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    trial.forget()
    # Broken kernels compute with whatever lies in memory, of which NumPy, under the interpreter, would warn.
    with numpy.errstate(all="ignore"):
        yield


@pytest.fixture
def here(device: torch.device) -> Device:
    return Device.current(device)


def outcome(problem: Problem, plan: Plan, device: Device) -> str:
    """What is wrong with the first and the last of a few runs."""
    run = trial.Trial(problem, plan, device)
    run.observe()
    run()
    run.observe()
    return run.wrong()


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_nothing_is_wrong_with_what_is_right(name: str, here: Device) -> None:
    found = candidates(PROBLEMS[name], here)
    for plan in (found[0], found[-1]):
        assert outcome(PROBLEMS[name], plan, here) == ""


def broken(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[str, int, Callable[..., None]], None]
) -> None:
    """``change(kernel, programs, launch)`` launches in its own way: ``launch(programs)``."""
    run = launch.run

    def launched(usual: launch.Launch, *arguments: Any) -> None:
        def of(programs: int) -> None:
            kernel, statics, constants = usual.kernel, usual.statics, usual.constants
            run(launch.Launch(kernel, programs, statics, constants), *arguments)

        change(usual.kernel.__name__, usual.programs, of)

    monkeypatch.setattr(launch, "run", launched)


def split(problem: Problem, here: Device) -> Plan:
    return next(plan for plan in candidates(problem, here) if plan.driver == "split")


@pytest.mark.parametrize(
    "name", ["forward", "bits", "evaluation", "backward", "backward bits", "backward output"]
)
def test_what_is_left_unwritten_is_seen(
    name: str, here: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last program is not launched: its part of memory holds what another run left there, or anything."""
    plan = split(PROBLEMS[name], here)
    broken(
        monkeypatch,
        lambda kernel, programs, run: run(
            programs - (kernel in ("normalize_kernel", "backward_apply_kernel"))
        ),
    )
    assert "off by inf" in outcome(PROBLEMS[name], plan, here)


@pytest.mark.parametrize("name", ["forward", "cumulative", "backward"])
def test_a_wait_that_is_skipped_is_seen(
    name: str, here: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second launch reads partial sums before the first has written them."""
    plan = split(PROBLEMS[name], here)
    late: list[Callable[[], None]] = []

    def change(kernel: str, programs: int, run: Callable[..., None]) -> None:
        if kernel in ("moments_kernel", "backward_reduce_kernel"):
            late.append(lambda: run(programs))
            return
        run(programs)
        while late:
            late.pop()()

    broken(monkeypatch, change)
    assert "times its bound" in outcome(PROBLEMS[name], plan, here)


def test_one_channels_statistics_do_not_pass_for_anothers(
    here: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = PROBLEMS["forward"]
    forward = launch.forward

    def swapped(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        y, stats, packed = forward(*arguments)
        return y, stats.flip(1), packed

    monkeypatch.setattr(launch, "forward", swapped)
    assert outcome(own, heuristic(own, here), here).startswith("mean of channels from 0 is off by")


def test_two_runs_must_have_the_same_bits(here: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    own, forward = PROBLEMS["forward"], launch.forward
    calls: list[int] = []

    def drifting(*arguments: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        y, stats, packed = forward(*arguments)
        calls.append(1)
        return (torch.nextafter(y, y + 1) if len(calls) > 2 else y), stats, packed

    monkeypatch.setattr(launch, "forward", drifting)
    assert (
        outcome(own, heuristic(own, here), here)
        == "y has other bits in the last run than in the first"
    )


def test_a_counter_that_does_not_count_is_seen(
    here: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, forward = PROBLEMS["forward"], launch.forward

    def twice(*arguments: Any) -> Any:
        forward(*arguments)
        return forward(*arguments)

    monkeypatch.setattr(launch, "forward", twice)
    assert "num_batches_tracked is 5 for 4" in outcome(own, heuristic(own, here), here)


def test_a_search_looks_at_its_candidates(
    here: Device, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """The fastest is broken: it leaves a part of y unwritten."""
    own = PROBLEMS["vectors"]
    monkeypatch.setenv("TRITON_BN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(search, "FEWEST", 2)
    fast = split(own, here)
    monkeypatch.setattr(search, "candidates", lambda *_: (*candidates(own, here)[:2], fast))
    now = {"plan": fast}

    class Noted(trial.Trial):
        def __call__(self) -> None:
            now["plan"] = self.plan
            super().__call__()

    def timer(run: Callable[[], None], runs: int) -> list[float]:
        for _ in range(runs):
            run()
        return [1e3 if now["plan"] == fast else 2e3] * runs

    broken(
        monkeypatch,
        lambda kernel, programs, run: run(
            programs - (now["plan"] == fast and kernel == "normalize_kernel")
        ),
    )
    with pytest.warns(RuntimeWarning, match="wrong results"):
        result = search.search(own, here, progress=False, timer=timer, trial=Noted)
    assert {row.status[:25] for row in result.rows if row.plan == fast} == {
        "wrong result: y of channe"
    }
    assert result.best is not None
    assert result.best.plan != fast


def test_whatever_a_launch_allocates_is_poisoned(
    here: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what earlier runs have left there: partials of the first launch, y of the second."""
    own, run = PROBLEMS["forward"], launch.run
    fresh: list[bool] = []

    def launched(wanted: launch.Launch, given: Any, arguments: Any) -> None:
        made = next(t for t in arguments[1:] if isinstance(t, torch.Tensor))
        fresh.append(bool(made.isnan().all()))
        run(wanted, given, arguments)

    monkeypatch.setattr(launch, "run", launched)
    looked_at = trial.Trial(own, split(own, here), here)
    looked_at.observe()
    looked_at.observe()
    assert fresh == [True] * 4


def test_memory_is_poisoned_only_meanwhile() -> None:
    with trial.poisoned():
        x = torch.ones(2, 3)
        for made in (
            torch.empty(4),
            torch.empty_like(x),
            x.new_empty(3),
            torch.empty_strided((2, 2), (2, 1)),
        ):
            assert made.isnan().all()
        assert (x.new_empty(4, dtype=torch.uint8) == 255).all()
    assert not torch.are_deterministic_algorithms_enabled()
