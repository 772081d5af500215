"""What the tests of the core share: the float64 oracle, who computes, and inputs in any memory layout.

The oracle is the package's own (:mod:`triton_bn.oracle`), as ``check`` and ``demo`` judge by it too;
test_functional.py holds it against F.batch_norm in float64.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from triton_bn import launch, route, verbs
from triton_bn.oracle import ACTIVATIONS, Bounded, activate, batch_norm, rounding, slope
from triton_bn.plan import DEVICES, Device, Plan, candidates, heuristic
from triton_bn.problem import Problem
from triton_bn.tuning.resolve import choosing

__all__ = [
    "ACTIVATIONS",
    "LAYOUTS",
    "Bounded",
    "Path",
    "activate",
    "arrange",
    "batch_norm",
    "path",
    "rounding",
    "slope",
]


#: A GPU as much smaller as the tensors of the tests are: every driver has plans for them.
SMALL = replace(DEVICES["H100"], processors=1, cache=0)


class Path:
    """Who computes what goes to ours: plain torch (:mod:`triton_bn.reference`) or the kernels, on a CPU interpreted."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = name
        self.device = device
        #: Which of a small GPU's plans the kernels run under; None is the heuristic's for this device.
        self.plan: int | None = None
        #: The driver whose plan they run under, where it has any for a problem.
        self.driver: str | None = None
        #: The kernels launched, by name.
        self.launches: list[str] = []

    def __repr__(self) -> str:
        return self.name

    @property
    def interpreted(self) -> bool:
        """Whether Triton's interpreter computes, which rounds and adds otherwise than a GPU."""
        return self.name == "kernels" and self.device.type == "cpu"


@pytest.fixture(params=["reference", "kernels"])
def path(
    request: pytest.FixtureRequest, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Runs a test once in plain torch and once through the kernels, as if the tensors were on a GPU.

    Memory that is not initialized is filled with NaN meanwhile, so that no result can hide that it was
    never written. A test module takes the fixture by ``path = oracle.path``.
    """
    path = Path(request.param, device)
    if path.name == "reference":
        monkeypatch.setattr(route, "on_gpu", lambda x: True)
        monkeypatch.setattr(verbs, "use_kernels", lambda x: False)
    elif device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("no GPU, and Triton's interpreter is off")
    else:
        assert route.on_gpu(torch.ones(1, device=device)), "nothing would run the kernels"

    def chosen(problem: Problem, device: Device, _: Any) -> Plan:
        if path.plan is None and path.driver is None:
            return heuristic(problem, device)
        plans = candidates(problem, SMALL)
        plans = tuple(plan for plan in plans if plan.driver == path.driver) or plans
        if path.plan is None:  # several tiles a chunk: what joins them is the driver's as well
            plans = tuple(plan for plan in plans if plan.transform.depth > 1) or plans
        plan = plans[(path.plan or 0) % len(plans)]
        return replace(plan, window=2, programs=3) if plan.driver == "streamed" else plan

    def run(wanted: launch.Launch, *arguments: Any) -> None:
        path.launches.append(wanted.kernel.__name__)
        usual(wanted, *arguments)

    usual = launch.run
    monkeypatch.setattr(launch, "run", run)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(8, device=device).isnan().all(), "uninitialized memory is not poisoned"
    # Overflow to infinity is arithmetic as on a GPU, of which NumPy, under the interpreter, would warn.
    with choosing(chosen), numpy.errstate(all="ignore"):
        yield path
    torch.use_deterministic_algorithms(before)


#: Memory layouts: the order of the dimensions in memory (outermost first), what lies unused before and
#: after each dimension and the step along it, and the first value's place in its storage.
LAYOUTS: dict[str, Callable[[int], tuple[list[int], dict[int, tuple[int, int, int]], int]]] = {
    "contiguous": lambda rank: ([*range(rank)], {}, 0),
    "channels_last": lambda rank: ([0, *range(2, rank), 1], {}, 0),
    "transposed": lambda rank: ([1, 0, *range(2, rank)], {}, 0),
    "reversed": lambda rank: ([*range(rank)][::-1], {}, 0),
    "swapped_space": lambda rank: ([0, 1, *range(rank - 1, 1, -1)], {}, 0),
    "sliced_channels": lambda rank: ([*range(rank)], {1: (1, 2, 1)}, 0),
    "sliced_channels_last": lambda rank: ([0, *range(2, rank), 1], {1: (3, 1, 1)}, 0),
    "strided_batch": lambda rank: ([*range(rank)], {0: (0, 0, 2)}, 0),
    "strided_channels": lambda rank: ([*range(rank)], {1: (0, 0, 3)}, 0),
    "cropped": lambda rank: ([*range(rank)], {rank - 1: (1, 1, 1)}, 0),
    "cropped_channels_last": lambda rank: ([0, *range(2, rank), 1], {rank - 1: (2, 0, 1)}, 0),
    "strided_space": lambda rank: ([*range(rank)], {rank - 1: (0, 0, 2)}, 0),
    "misaligned": lambda rank: ([*range(rank)], {}, 1),
    "expanded_batch": lambda rank: ([*range(rank)], {0: (0, 0, 0)}, 0),
    "expanded_channels": lambda rank: ([*range(rank)], {1: (0, 0, 0)}, 0),
    "expanded_space": lambda rank: ([*range(rank)], {rank - 1: (0, 0, 0)}, 3),
}


def arrange(values: Tensor, layout: str) -> Tensor:
    """``values`` in one of :data:`LAYOUTS`, with NaN in all the memory around them.

    An expanded dimension (step 0) repeats its first value.
    """
    shape = values.shape
    order, padding, offset = LAYOUTS[layout](values.dim())
    sizes = list(values.shape)
    window: list[slice] = [slice(None)] * values.dim()
    for d, (before, after, step) in padding.items():
        if step == 0:
            values, sizes[d] = values.narrow(d, 0, 1), 1
        else:
            window[d] = slice(before, before + sizes[d] * step, step)
            sizes[d] = before + sizes[d] * step + after
    storage = values.new_full((offset + math.prod(sizes),), math.nan)
    block = storage[offset:].view([sizes[d] for d in order])
    view = block.permute([order.index(d) for d in range(values.dim())])[tuple(window)]
    return view.copy_(values).expand(shape)
