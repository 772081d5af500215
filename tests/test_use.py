"""Launch configurations that the user sees and sets: ``layer.candidates`` and ``triton_bn.use``."""

from __future__ import annotations

import threading
from typing import Any

import oracle
import pytest
import torch
from torch import Tensor, nn

import triton_bn
from triton_bn import launch
from triton_bn.plan import DEVICES, Plan, Plans, candidates
from triton_bn.tuning import memory

RUNS = pytest.mark.skipif(
    not (torch.cuda.is_available() or launch.interpreting()), reason="no GPU, and no interpreter"
)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels launched, by name."""
    names: list[str] = []
    run = launch.run

    def noting(wanted: launch.Launch, *arguments: Any) -> None:
        names.append(wanted.kernel.__name__.removesuffix("_kernel"))
        run(wanted, *arguments)

    monkeypatch.setattr(launch, "run", noting)
    return names


@pytest.fixture
def layer(device: torch.device) -> triton_bn.BatchNorm2d:
    return triton_bn.BatchNorm2d(8, activation="relu", device=device)


@pytest.fixture
def x(device: torch.device) -> Tensor:
    return torch.randn(4, 8, 6, 6, device=device, requires_grad=True)


def both(plans: Plans) -> tuple[Plan, Plan]:
    return plans.forward, plans.backward


def test_candidates_are_all_plans_of_both_directions(
    layer: triton_bn.BatchNorm2d, x: Tensor
) -> None:
    found = layer.candidates(x, x, device="H200")
    with memory.record() as seen:
        usual = layer.plan(x, x, device="H200")
    (forward, gpu), (backward, _) = seen
    assert (found.device, found.problems) == (gpu, (forward, backward))
    assert found.forward == candidates(forward, gpu)
    assert found.backward == candidates(backward, gpu)
    assert (found.forward[0], found.backward[0]) == both(usual)
    lines = str(found).splitlines()
    assert len(lines) == 3 + len(found.forward) + len(found.backward)
    assert [line.count("(heuristic)") for line in lines].count(1) == 2
    assert {plan.driver for plan in found.forward} == {"resident", "split"}


@RUNS
def test_a_layer_runs_by_each_plan_it_is_given(
    layer: triton_bn.BatchNorm2d, x: Tensor, launched: list[str]
) -> None:
    listed = layer.candidates(x)
    for way in ("forward", "backward"):
        plans = getattr(listed, way)
        for plan in (plans[0], plans[-1]):
            launched.clear()
            with triton_bn.use(plan):
                assert (getattr(layer.plan(x), way), getattr(layer.plan(x), way).source) == (
                    plan,
                    "given",
                )
                layer(x).sum().backward()
            first = launched[0] if way == "forward" else launched[-1]
            expected = {
                ("forward", "resident"): "forward",
                ("forward", "split"): "moments",
                ("backward", "resident"): "backward",
                ("backward", "split"): "backward_apply",
            }
            assert first == expected[way, plan.driver]
    assert layer.plan(x).forward.source == "heuristic"


@RUNS
@pytest.mark.parametrize("driver", ["resident", "split"])
def test_a_driver_is_used_where_it_has_a_plan(
    driver: str, layer: triton_bn.BatchNorm2d, x: Tensor, launched: list[str]
) -> None:
    whole = {"resident": ["forward", "backward"]}
    with triton_bn.use(driver):
        y = layer(x)
        y.sum().backward()
        assert {plan.driver for plan in both(layer.plan(x))} == {driver}
    halves = ["moments", "normalize", "backward_reduce", "backward_apply"]
    assert launched == whole.get(driver, halves)
    expected = oracle.batch_norm(x, training=True, activation="relu", interpreted=not x.is_cuda)
    expected["y"].assert_close(y, "y")


def test_where_a_driver_has_no_plan_the_usual_one_runs_and_says_so(
    layer: triton_bn.BatchNorm2d, x: Tensor
) -> None:
    usual = layer.plan(x)
    with triton_bn.use("streamed"):
        plans = layer.plan(x)
    assert plans == usual
    assert "(heuristic: no streamed plan here)" in str(plans)


def test_a_pair_is_for_forward_and_backward(layer: triton_bn.BatchNorm2d, x: Tensor) -> None:
    listed, usual = layer.candidates(x), layer.plan(x)
    forward, backward = listed.forward[-1], listed.backward[-2]
    with triton_bn.use((forward, backward)):
        given = layer.plan(x)
        assert both(given) == (forward, backward)
    with triton_bn.use(given):
        assert both(layer.plan(x)) == (forward, backward)
    with triton_bn.use((None, backward)):
        assert both(layer.plan(x)) == (usual.forward, backward)
        with triton_bn.use(("split", None)):  # the innermost counts, None is what is around it
            assert layer.plan(x).forward.driver == "split"
            assert layer.plan(x).backward == backward
        assert layer.plan(x).forward == usual.forward
    assert layer.plan(x) == usual


@RUNS
def test_a_plan_that_is_no_candidate_is_an_error_and_changes_nothing(
    layer: triton_bn.BatchNorm2d, x: Tensor
) -> None:
    large, gpu = torch.empty(64, 64, 14, 14, device="meta"), DEVICES["H200"]
    layer64 = triton_bn.BatchNorm2d(64)
    other = layer64.candidates(large, device=gpu)
    with (
        triton_bn.use(other.forward[-1]),
        pytest.raises(ValueError, match="no candidate of forward"),
    ):
        layer(x)
    assert layer.num_batches_tracked == 0
    only = next(plan for plan in other.forward if plan not in other.backward)
    with triton_bn.use(only):  # of one direction alone it leaves the other to the usual plan
        assert both(layer64.plan(large, device=gpu)) == (only, other.backward[0])
    with triton_bn.use((None, only)), pytest.raises(ValueError, match=r"layer\.candidates\(x\)"):
        layer64.plan(large, device=gpu)


def test_other_threads_are_left_alone(layer: triton_bn.BatchNorm2d, x: Tensor) -> None:
    found: list[Plan] = []
    with triton_bn.use("split"):
        thread = threading.Thread(target=lambda: found.append(layer.plan(x).forward))
        thread.start()
        thread.join()
    assert (found[0].driver, found[0].source) == ("resident", "heuristic")


@pytest.mark.gpu
def test_backward_runs_by_it_in_autograds_own_thread(
    layer: triton_bn.BatchNorm2d, x: Tensor, launched: list[str]
) -> None:
    y = layer(x)
    launched.clear()
    with triton_bn.use("split"):
        y.sum().backward()
    assert launched == ["backward_reduce", "backward_apply"]


@pytest.mark.parametrize("given", [3, None, ("split",), ("split", 3), ("split", "split", "split")])
def test_what_cannot_be_used_is_an_error_at_once(given: object) -> None:
    with pytest.raises(TypeError, match="expects a plan, a driver's name, or a pair"):
        triton_bn.use(given)  # type: ignore[arg-type]


def test_a_driver_must_exist() -> None:
    with pytest.raises(ValueError, match="'fast': they are resident, split, streamed"):
        triton_bn.use("fast")


@pytest.mark.parametrize("verb", ["plan", "candidates"])
def test_a_shape_is_no_input(verb: str, layer: nn.Module) -> None:
    with pytest.raises(TypeError, match="argument 'input' must be Tensor, not tuple"):
        getattr(layer, verb)((1, 2))


def test_without_a_model_there_is_nothing_to_tune() -> None:
    with pytest.raises(TypeError, match="Module, but got NoneType"):
        triton_bn.tune(None)  # type: ignore[arg-type]
