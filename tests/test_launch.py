"""Every plan that a search may try computes the same, run in Triton's interpreter or on the GPU."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import direct
import numpy
import oracle
import pytest
import torch
from torch import Tensor

from triton_bn import launch, reference, route, verbs
from triton_bn.functional import batch_norm
from triton_bn.plan import DEVICES, Plan, Tile, candidates
from triton_bn.problem import Activation, Problem
from triton_bn.tuning.resolve import choosing

#: A GPU as much smaller as the tensors here are: every driver is a candidate, programs are few.
SMALL = replace(DEVICES["H100"], processors=1, cache=0)

#: An activation of whose slopes y tells nothing, so that backward is given a bit a value.
BY_BITS = Activation("leaky_relu", -0.5)

#: Shape, layout, dtype, activation, residual: ragged rows and columns, and rows for several chunks.
PROBLEMS = {
    "S=49": ((3, 5, 7, 7), "contiguous", torch.float32, None, False),
    "S=9 with bits": ((5, 9, 3, 3), "contiguous", torch.float32, BY_BITS, True),
    "S=50": ((6, 3, 5, 10), "contiguous", torch.float64, None, False),
    "S=257": ((3, 2, 257), "contiguous", torch.bfloat16, "silu", False),
    "S=1": ((301, 5), "contiguous", torch.float32, "gelu", True),
    "channels_last": ((7, 12, 5, 5), "channels_last", torch.float32, None, False),
    "channels_last with bits": ((2, 24, 4, 5), "channels_last", torch.bfloat16, BY_BITS, True),
    "sliced": ((11, 4, 5, 5), "sliced_channels", torch.float32, "relu", True),
    "sliced channels_last": ((3, 9, 5, 5), "sliced_channels_last", torch.float32, "elu", True),
}


def plans(problem: Problem) -> list[Plan]:
    """All candidates, streamed in windows of two blocks by three programs."""
    found = [
        replace(plan, window=2, programs=3) if plan.driver == "streamed" else plan
        for plan in candidates(problem, SMALL)
    ]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("name", list(PROBLEMS))
def test_every_candidate_is_right(
    name: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, layout, dtype, activation, residual = PROBLEMS[name]
    torch.manual_seed(0)
    channels = shape[1]
    parameter = torch.float64 if dtype == torch.float64 else torch.float32
    x = oracle.arrange((torch.randn(shape) * 2 + 1).to(dtype), layout).to(device)
    added = torch.randn(shape).to(dtype).to(device) if residual else None
    dy = torch.randn(shape).to(dtype).to(device)
    vectors = [torch.rand(channels).to(parameter).to(device) + 0.5 for _ in range(4)]
    mean, var, weight, bias = vectors
    expected = oracle.batch_norm(
        x, mean, var, weight, bias, True, residual=added, activation=activation, dy=dy,
        interpreted=launch.interpreting(),
    )  # fmt: skip

    chosen: dict[str, list[Plan]] = {"forward": [], "backward": []}
    choice = 0

    def choose(problem: Problem, *_: Any) -> Plan:
        chosen[problem.direction] = found = plans(problem)
        return found[choice % len(found)]

    monkeypatch.setattr(route, "on_gpu", lambda _: True)
    monkeypatch.setattr(verbs, "use_kernels", lambda _: True)

    def run() -> dict[str, Tensor]:
        leaf = [t.detach().requires_grad_() for t in (x, weight, bias)]
        extra = None if added is None else added.detach().requires_grad_()
        running, options = (
            (mean.clone(), var.clone()),
            {"residual": extra, "activation": activation},
        )
        with choosing(choose):
            y = batch_norm(leaf[0], *running, *leaf[1:], True, **options)
            gradients = torch.autograd.grad(y, [*leaf, *([] if extra is None else [extra])], dy)
        names = ("y", "running_mean", "running_var", "dx", "dweight", "dbias", "dresidual")
        return dict(zip(names, (y.detach(), *running, *gradients), strict=False))

    drivers: set[str] = set()
    while choice == 0 or choice < max(map(len, chosen.values())):
        results = run()
        under = {way: found[choice % len(found)] for way, found in chosen.items()}
        for key, value in results.items():
            try:
                expected[key].assert_close(value, key)
            except AssertionError as error:
                raise AssertionError(f"{under}: {error}") from None
        if not drivers >= {plan.driver for plan in under.values()}:
            drivers |= {plan.driver for plan in under.values()}
            for key, value in run().items():
                assert torch.equal(value, results[key]), f"{under}: {key} differs in a second run"
        choice += 1
    assert drivers == {"resident", "split", "streamed"}


#: (shape, columns of a tile, blocks of a window, splits): channels that are larger than a window, and
#: channels that begin and end within one.
WINDOWS = [
    ((5, 3, 20), 8, 1, 1),
    ((5, 3, 20), 8, 2, 2),
    ((4, 2, 61), 8, 3, 1),
    ((3, 40, 3), 16, 1, 2),
    ((9, 24), 8, 1, 2),
]


@pytest.mark.parametrize(("shape", "columns", "window", "splits"), WINDOWS)
@pytest.mark.parametrize("programs", [1, 3])
def test_streamed_waits_for_all_that_it_reads(
    shape: tuple[int, ...],
    columns: int,
    window: int,
    splits: int,
    programs: int,
    device: torch.device,
) -> None:
    """A channel of several windows is whole before any of it is transformed, with one program too."""
    torch.manual_seed(0)
    x, dy = torch.randn(2, *shape, device=device).unbind()
    x = x * 3 + 2
    names = ("weight", "bias", "running_mean", "running_var")
    given = {name: torch.rand(shape[1], device=device) + 0.5 for name in names}
    expected = oracle.batch_norm(
        x, given["running_mean"], given["running_var"], given["weight"], given["bias"], True, dy=dy,
        interpreted=launch.interpreting(),
    )  # fmt: skip
    tile = Tile(2, columns, 1, 4, splits)
    plan = Plan("streamed", tile, tile, window=window, programs=programs)
    with direct.poisoned():
        for name, value in direct.step(x, dy, plan, **given).items():
            expected[name].assert_close(value, name)


def test_the_two_launches_of_split_may_have_tiles_of_their_own(device: torch.device) -> None:
    """The second merges what the first has found of each channel, by the first's blocks and splits."""
    torch.manual_seed(0)
    x, dy = torch.randn(2, 9, 5, 12, device=device).unbind()
    weight = torch.rand(5, device=device) + 0.5
    expected = oracle.batch_norm(
        x, None, None, weight, None, True, dy=dy, interpreted=launch.interpreting()
    )
    plan = Plan("split", transform=Tile(4, 32, 1, 4, 2), reduce=Tile(2, 8, 2, 4, 3))
    with direct.poisoned():
        for name, value in direct.step(x, dy, plan, weight=weight).items():
            expected[name].assert_close(value, name)


def infinite_plans(last: bool) -> list[Plan]:
    """Of each driver, for (9, 4, 2, 5): tiles that hold parts of channels, one whole, and several."""
    tile, columns = Tile(2, 8, 2, 4, 2), 4 if last else 64
    whole = Tile(2, columns, 45 if last else 5)
    return [
        Plan("split", tile, tile),
        Plan("streamed", tile, tile, window=1, programs=3),
        Plan("resident", whole, channels=4),
        Plan("resident", replace(whole, columns=columns // 2), channels=2),
    ]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("choice", range(4))
def test_a_channel_with_an_infinity_has_the_mean_that_float64_gives(
    layout: str, choice: int, device: torch.device
) -> None:
    """Wherever it stands: in the values that means are relative to, behind them, in a part that is merged.

    The variance is NaN, as are y and dx, and the channels beside it know nothing of it.
    """
    inf, nan = math.inf, math.nan
    values = [
        {(0, 1, 0, 0): inf},
        {(3, 1, 1, 2): -inf, (3, 0, 1, 2): inf},
        {(8, 1, 1, 4): inf, (0, 2, 0, 0): nan},
        {(0, 0, 0, 0): inf, (1, 0, 0, 0): -inf, (5, 3, 0, 0): inf, (5, 3, 0, 1): inf},
    ]
    plan = infinite_plans(layout != "contiguous")[choice]
    for places in values:
        torch.manual_seed(0)
        x, dy = torch.randn(9, 4, 2, 5) * 3 + 2, torch.randn(9, 4, 2, 5)
        for place, value in places.items():
            x[place] = value
        exact = torch.zeros(4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
        torch.nn.functional.batch_norm(x.double(), *exact, training=True)
        running = torch.zeros(4, device=device), torch.ones(4, device=device)
        x = oracle.arrange(x, layout).to(device)
        # Such arithmetic is as on a GPU; NumPy, under the interpreter, would warn of it.
        with direct.poisoned(), numpy.errstate(all="ignore"):
            found = direct.step(
                x, dy.to(device), plan, running_mean=running[0], running_var=running[1]
            )
        for name, value, double in zip(("mean", "var"), running, exact, strict=True):
            same = torch.isclose(value.double().cpu(), double, rtol=1e-4, equal_nan=True)
            assert same.all(), f"{places}: running_{name} {value}, in float64 {double}"
        wrong = ~x.isfinite().all(0).all(-1).all(-1)
        for name in ("y", "dx"):
            assert found[name][:, wrong].isnan().all(), f"{places}: {name}"
            assert found[name][:, ~wrong].isfinite().all(), f"{places}: {name}"


def test_threads_do_not_disturb_one_another(device: torch.device) -> None:
    """Triton's interpreter is one for the whole process: launches of several threads take turns."""
    torch.manual_seed(0)
    inputs = torch.randn(8, 2, 6, 3, 20, device=device)
    tile = Tile(2, 16, 1, 4, 2)
    plan = Plan("split", tile, tile)
    alone = [direct.step(x, dy, plan) for x, dy in inputs]

    def work(i: int) -> list[dict[str, Tensor]]:
        return [direct.step(*inputs[i], plan) for _ in range(3)]

    with ThreadPoolExecutor(len(inputs)) as pool:
        for right, found in zip(alone, pool.map(work, range(len(inputs))), strict=True):
            for each in found:
                for name, value in each.items():
                    assert torch.equal(value, right[name]), name


@pytest.mark.parametrize(
    ("layout", "choice", "eps"),
    [
        *(("contiguous", choice, 1e-60) for choice in range(5)),
        ("channels_last", 2, 1e-39),
        ("contiguous", 0, 1e-320),
    ],
)
def test_a_constant_channel_under_an_eps_that_float32_cannot_hold(
    layout: str, choice: int, eps: float, device: torch.device
) -> None:
    """y is the bias, and dx what float64 gives, where float32 can hold that; the others do not see eps."""
    torch.manual_seed(0)
    x, dy = torch.randn(2, 9, 4, 2, 5).unbind()
    x[:, 1] = 3.0
    bias = torch.rand(4)
    exact = dy.double() - dy.double().mean((0, 2, 3), keepdim=True)
    normalized = (x.double() - x.double().mean((0, 2, 3), keepdim=True)) * x.double().var(
        (0, 2, 3), correction=0, keepdim=True
    ).clamp_min(1e-300).rsqrt()
    if choice < 4:
        plan = infinite_plans(layout != "contiguous")[choice]
        with direct.poisoned():
            found = direct.step(
                oracle.arrange(x, layout).to(device),
                dy.to(device),
                plan,
                bias=bias.to(device),
                eps=eps,
            )
        y, dx = found["y"].cpu(), found["dx"].cpu()
    else:
        y, stats, _ = reference.forward(x, None, bias, None, None, None, None, 0.1, eps, None)
        dx = (dy - dy.mean((0, 2, 3), keepdim=True))[:, 1] * stats[1, 1]
        dx = torch.stack([dx, dx], 1)
    torch.testing.assert_close(
        y.double(), normalized + bias.double()[:, None, None], rtol=1e-5, atol=1e-5
    )
    want = exact[:, 1] * eps**-0.5
    fits = want.abs() < 3e38
    torch.testing.assert_close(dx[:, 1].double()[fits], want[fits], rtol=1e-4, atol=0.0)
    assert not dx.isnan().any()
