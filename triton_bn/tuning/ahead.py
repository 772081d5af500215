"""Compilation before it is needed: many plans in parallel processes, into Triton's cache on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from time import monotonic

from triton_bn.inspection.report import TARGETS, Case, KernelFacts, compile_each
from triton_bn.plan import Device, Plan
from triton_bn.problem import Problem
from triton_bn.tuning.results import progress_bar

__all__ = ["Facts", "compile_plans", "dominated"]

#: Of a plan: what the compiler says of each of its launches, or why it does not compile.
Facts = Mapping[Plan, tuple[KernelFacts, ...] | str]


def compile_plans(
    wanted: Iterable[tuple[Problem, Device, Sequence[Plan]]],
    *,
    deadline: float = math.inf,
    progress: bool = True,
    jobs: int | None = None,
) -> dict[tuple[Problem, Device], dict[Plan, tuple[KernelFacts, ...] | str]]:
    """Compiles plans for problems, all CPUs at a time, and says what came of each.

    A plan that the compiler dies of costs that plan alone. A GPU whose architecture is none of
    :data:`triton_bn.inspection.report.TARGETS` is left to compile at the first launch.

    Args:
        deadline: by the monotonic clock; what is not compiled then is missing in the answer.
        progress: show it on stderr.
        jobs: how many processes.
    """
    found: dict[tuple[Problem, Device], dict[Plan, tuple[KernelFacts, ...] | str]] = {}
    keys, cases = [], []
    for problem, device, plans in wanted:
        if device.arch in TARGETS:
            for plan in plans:
                keys.append((problem, device))
                cases.append(Case(problem, plan, device.arch))
    if not cases:
        return found
    with (
        progress_bar("compiling", len(cases), progress) as advance,
        closing(compile_each(cases, jobs=jobs, instructions=False)) as answers,
    ):
        for i, answer in answers:
            found.setdefault(keys[i], {})[cases[i].plan] = answer
            advance(math.inf)
            if monotonic() >= deadline:
                break
    return found


def dominated(problem: Problem, facts: Facts) -> set[Plan]:
    """The plans beside which another of the same driver is better in a fact, and worse in none."""
    merits = {
        plan: _merits(problem, plan, kernels)
        for plan, kernels in facts.items()
        if not isinstance(kernels, str)
    }
    return {
        plan
        for plan, own in merits.items()
        if any(
            other.driver == plan.driver
            and theirs != own
            and all(a >= b for a, b in zip(theirs, own, strict=True))
            for other, theirs in merits.items()
        )
    }


def _merits(problem: Problem, plan: Plan, kernels: tuple[KernelFacts, ...]) -> tuple[float, ...]:
    """Of the worst launch, each the more the better."""
    tiles = (
        [plan.transform] if len(kernels) == 1 else [plan.reduce or plan.transform, plan.transform]
    )
    held = (
        tile.rows * tile.columns * tile.depth * problem.itemsize * kernel.resident
        for tile, kernel in zip(tiles, kernels, strict=True)
    )
    return (
        -max(kernel.spilled for kernel in kernels),
        -sum(kernel.moved for kernel in kernels),
        min(
            size for kernel in kernels for size in (*kernel.loads.values(), *kernel.stores.values())
        ),
        min(kernel.occupancy for kernel in kernels),
        # Bytes under way on a processor, and how much of the last wave has work.
        min(held),
        min(kernel.waves / max(math.ceil(kernel.waves), 1) for kernel in kernels),
        # Partials, which each program of the second launch reads.
        -max(tile.splits for tile in tiles),
    )
