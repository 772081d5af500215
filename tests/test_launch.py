"""Every plan that a search may try computes the same, run in Triton's interpreter or on the GPU."""

from __future__ import annotations

from dataclasses import replace

import oracle
import pytest
import torch
from torch import Tensor

from triton_bn import launch, route, verbs
from triton_bn.functional import batch_norm
from triton_bn.plan import DEVICES, Plan, candidates
from triton_bn.problem import Problem

#: A GPU as much smaller as the tensors here are: every driver is a candidate, programs are few.
SMALL = replace(DEVICES["H100"], processors=1, cache=1 << 10)

#: Shape, layout, dtype, activation, residual: ragged rows and columns, and rows for several chunks.
PROBLEMS = {
    "S=49": ((3, 5, 7, 7), "contiguous", torch.float32, None, False),
    "S=9 with bits": ((5, 9, 3, 3), "contiguous", torch.float32, "relu", True),
    "S=50": ((6, 3, 5, 10), "contiguous", torch.float64, None, False),
    "S=257": ((3, 2, 257), "contiguous", torch.bfloat16, "silu", False),
    "S=1": ((301, 5), "contiguous", torch.float32, "gelu", True),
    "channels_last": ((7, 12, 5, 5), "channels_last", torch.float32, None, False),
    "channels_last with bits": ((2, 24, 4, 5), "channels_last", torch.bfloat16, "relu6", True),
    "sliced": ((11, 4, 5, 5), "sliced_channels", torch.float32, None, False),
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

    def resolve(problem: Problem, _: Tensor) -> Plan:
        chosen[problem.direction] = found = plans(problem)
        return found[choice % len(found)]

    monkeypatch.setattr(route, "use_kernels", lambda _: True)
    monkeypatch.setattr(verbs, "_resolve", resolve)

    def run() -> dict[str, Tensor]:
        leaf = [t.detach().requires_grad_() for t in (x, weight, bias)]
        extra = None if added is None else added.detach().requires_grad_()
        running = mean.clone(), var.clone()
        y = batch_norm(leaf[0], *running, *leaf[1:], True, residual=extra, activation=activation)
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
    assert drivers >= {"resident", "split"}
