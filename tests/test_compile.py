"""What the compiler makes of the plans, for GPUs that need not be there.

Everything is compiled offline by :func:`triton_bn.report.compile_all`, in processes without Triton's
interpreter. sm_90 gets all layers of four networks, all activations and dtypes, and the candidates of a
few problems; sm_80, sm_100 and gfx942 get ResNet-50 and one problem of each kind. No kernel may spill.

A thread must move 16 bytes at a time wherever rows of x and of what is dense start on 16 bytes (so at
every layer of the networks: their channels are multiples of 8) and a tile has as many for every thread.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
import torch

from perf.shapes import NETWORKS
from triton_bn import launch, report
from triton_bn.plan import Plan, Tile
from triton_bn.problem import ACTIVATIONS, Activation, Problem, describe
from triton_bn.report import TARGETS, Case, KernelFacts, gradient_of, plans

#: Beside other test processes, one compiles at a time.
JOBS = 1 if "PYTEST_XDIST_WORKER" in os.environ else None
LAYERS = ("ResNet-50", "MobileNetV3", "EfficientNet-B0", "DenseNet-121")
OTHERS = ("sm_80", "sm_100", "gfx942")

#: Input bytes from which on every processor must have a program.
ENOUGH = 16 << 10


def problem(
    shape: tuple[int, ...],
    layout: str = "contiguous",
    dtype: torch.dtype = torch.bfloat16,
    *,
    training: bool = True,
    activation: str | None = None,
    residual: bool = False,
    cumulative: bool = False,
) -> Problem:
    x = torch.empty(shape, dtype=dtype, device="meta")
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":  # half of the channels of a tensor
        x = x.repeat(1, 2, *[1] * (x.dim() - 2))[:, : shape[1]]
    elif layout == "misaligned":
        x = torch.empty(x.numel() + 1, dtype=dtype, device="meta")[1:].view(shape)
    act = Activation.of(activation)
    return describe(
        x,
        training=training,
        residual=residual,
        activation=act,
        bits=act is not None and act.two_slopes and (residual or not training),
        cumulative=cumulative,
    )[0]


def both(problems: Iterable[Problem]) -> list[Problem]:
    """Forward and backward."""
    return [p for forward in problems for p in (forward, gradient_of(forward))]


def compiled(cases: Sequence[Case]) -> list[tuple[Case, tuple[KernelFacts, ...]]]:
    facts = report.compile_all(cases, jobs=JOBS, instructions=False)
    return list(zip(cases, facts, strict=True))


def complaints(case: Case, facts: tuple[KernelFacts, ...], *, fill: bool = True) -> list[str]:
    problem, plan, target = case
    found = []
    for kernel in facts:
        if kernel.spilled:
            found.append(f"spills {kernel.spilled} bytes")
        if problem.vector * problem.itemsize == 16:
            for name, size in [*kernel.loads.items(), *kernel.stores.items()]:
                if name in {"x", "y", "dy", "dx", "residual", "dresidual"} and size < 16:
                    found.append(f"{size}-byte accesses to {name}")
        processors = TARGETS[target].device.processors
        if (
            fill
            and problem.numel * problem.itemsize >= processors * ENOUGH
            and kernel.programs < 0.9 * processors
        ):
            found.append(f"{kernel.programs} programs")
        found = [text if ":" in text else f"{kernel.kernel}: {text}" for text in found]
    return [f"{target} {problem}, {plan}: {text}" for text in found]


def assert_sound(cases: Sequence[Case], *, fill: bool = True) -> None:
    bad = [text for case, facts in compiled(cases) for text in complaints(case, facts, fill=fill)]
    assert not bad, f"{len(bad)} complaints:\n" + "\n".join(bad)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("network", LAYERS)
def test_heuristic_s_plans_of_a_network(network: str, layout: str) -> None:
    layers = {
        problem((batch, layer.channels, *layer.spatial), layout)
        for layer in NETWORKS[network]
        for batch in (1, 32, 256)
    }
    assert_sound([case for p in both(layers) for case in plans(p, "sm_90", search=False)])


@pytest.mark.parametrize("target", OTHERS)
def test_heuristic_s_plans_of_resnet_50_elsewhere(target: str) -> None:
    layers = [
        problem((32, layer.channels, *layer.spatial), layout, activation="relu", residual=True)
        for layer in NETWORKS["ResNet-50"]
        for layout in ("contiguous", "channels_last")
    ]
    assert_sound([case for p in both(layers) for case in plans(p, target, search=False)])
