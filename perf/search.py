"""Tunes the most telling batch norms, and keeps the table of all candidates for the plots."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor

import torch

from perf.cases import Case
from perf.runner import Results
from triton_bn.inspection.report import gradient_of
from triton_bn.plan import Device, Plan, candidates
from triton_bn.problem import Problem, describe
from triton_bn.tuning.memory import export_table
from triton_bn.tuning.resolve import resolve
from triton_bn.tuning.search import search as search_one
from triton_bn.tuning.trial import Trial, forget

__all__ = ["problems", "search"]


def problems(cases: Sequence[Case]) -> Iterator[Problem]:
    """The problems of the cases' batch norms in training, forward and backward."""
    for case in cases:
        if "forward" in case.measures and case.op == "bn":
            yield from problems_of(case)


def problems_of(case: Case) -> tuple[Problem, Problem]:
    """Forward and backward of a case's batch norm in training, without what follows it."""
    x = torch.empty(case.shape, dtype=case.torch_dtype, device="meta")
    problem, _ = describe(x.to(memory_format=case.memory_format), training=True)
    return problem, gradient_of(problem)


def search(
    cases: Sequence[Case],
    results: Results,
    device: Device,
    *,
    budget: float,
    pool: Executor,
    now: Callable[[], float] = time.monotonic,
    say: Callable[[str], None] = print,
) -> int:
    """Searches problem after problem until the budget (seconds) is spent: so many.

    The plans found are what triton_bn runs from then on; ``plans.json`` in the folder has them too,
    to be shipped or imported. Problems whose plan was found before are not searched again.
    """
    deadline, searched = now() + budget, 0
    for problem in problems(cases):
        if now() >= deadline:
            break
        if resolve(problem, device).source in ("disk", "tuned now"):
            continue
        # Compiled side by side first, so that the search finds every kernel in Triton's cache.
        for future in [
            pool.submit(_compile, problem, plan, device) for plan in candidates(problem, device)
        ]:
            future.exception()
        result = search_one(problem, device, budget=max(deadline - now(), 0.0), progress=False)
        others = [row for row in results.search if row["problem"] != str(problem)]
        results.search = others + result.as_rows()
        results.save()
        searched += 1
        say(result.summary())
    if searched:
        export_table(results.folder / "plans.json", device)
    return searched


def _compile(problem: Problem, plan: Plan, device: Device) -> None:
    Trial(problem, plan, device)()
    forget()
    torch.cuda.empty_cache()
