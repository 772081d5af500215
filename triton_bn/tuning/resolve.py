"""Which plan runs a problem.

:func:`resolve` answers from memory, then from the user's file on disk, then from a table shipped
for the GPU, then by :func:`triton_bn.plan.heuristic` (:mod:`triton_bn.tuning.memory`). Nothing is timed
unless somebody asks: by :func:`triton_bn.tune`, on the command line, or by ``TRITON_BN_TUNE=1`` in the
environment. That searches when a problem that has no plan on disk is first met. Inside :func:`use` it
answers with what the user gives.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import product
from typing import Any, Literal, get_args, get_type_hints

import torch

from triton_bn.plan import Device, Plan, Plans, candidates, with_source
from triton_bn.problem import Problem
from triton_bn.tuning import cache, memory
from triton_bn.tuning.search import search_once

__all__ = ["choosing", "resolve", "use", "usual"]

#: ``choose(problem, device, usual)``: the plan to run by; ``usual()`` is the one that it would be otherwise.
Choose = Callable[[Problem, Device, Callable[[], Plan]], Plan]

DRIVERS = get_args(get_type_hints(Plan)["driver"])


def resolve(problem: Problem, device: Device) -> Plan:
    """The plan to launch. Its ``source``: "heuristic", "shipped", "disk", "tuned now" or "given"."""
    if _choosing:
        return _chosen(problem, device)
    plan = memory.memo.get((problem, device))
    return _first(problem, device) if plan is None else plan


# ---- Given by the user ---------------------------------------------------------------------------

#: How many :func:`choosing` are open, in any thread: mostly none, and then :func:`resolve` asks no further.
_choosing = 0
_lock = threading.Lock()

#: Its place among what PyTorch keeps for a thread, and hands to the threads in which autograd runs backward.
_KEY = "triton_bn.use"


def use(
    plan: Plan | str | Plans | tuple[Plan | str | None, Plan | str | None],
) -> AbstractContextManager[None]:
    """Inside ``with triton_bn.use(plan):`` the layers run by a launch configuration that is given.

    It holds for what is launched inside, by this thread and by the backward passes that it starts: a forward
    inside and its backward outside run by different plans, with equal results. The innermost ``use`` counts.
    Nothing is searched or remembered meanwhile. ``layer.plan(x)`` says what would run.

    Args:
        plan: one of

            - a :class:`~triton_bn.plan.Plan`, as ``layer.candidates(x)`` lists them. It runs forward and
              backward, each where it is one of its candidates; the other direction runs by its usual plan.
            - a driver's name, ``"resident"``, ``"split"`` or ``"streamed"``: the usual plan where it is of
              that driver, else the first candidate that is. Where there is none it is the usual plan,
              whose ``source`` says so.
            - a pair of those for forward and backward, where ``None`` is the usual plan; or what
              ``layer.plan(x)`` returns.

    Raises:
        ValueError: for a name that is no driver's; and where a layer is called for whose problem the plan is
            no candidate (forward nor backward, or in the direction for which a pair gives it).
        TypeError: for anything else.

    Example:
        >>> layer, x = triton_bn.BatchNorm2d(8), torch.randn(4, 8, 6, 6)
        >>> with triton_bn.use("split"):
        ...     print(layer.plan(x).forward.driver)
        split
    """
    if isinstance(plan, Plans):
        plan = (plan.forward, plan.backward)
    pair = isinstance(plan, tuple)
    both = plan if isinstance(plan, tuple) else (plan, plan)
    if len(both) != 2 or not all(
        isinstance(one, Plan | str) or (pair and one is None) for one in both
    ):
        raise TypeError(
            "triton_bn.use expects a plan, a driver's name, or a pair of those for forward and backward, "
            f"but got {plan!r}"
        )
    for one in both:
        if isinstance(one, str) and one not in DRIVERS:
            raise ValueError(f"no driver is called {one!r}: they are {', '.join(DRIVERS)}")
    given: dict[str, Any] = dict(zip(("forward", "backward"), both, strict=True))
    known: dict[tuple[Problem, Device], Plan] = {}

    def choose(problem: Problem, device: Device, usual: Callable[[], Plan]) -> Plan:
        one = given[problem.direction]
        if one is None:
            return usual()
        if isinstance(one, str):
            plan = usual()
            return plan if plan.driver == one else _of_driver(one, problem, device, plan)
        found = known.get((problem, device))
        if found is not None:
            return found
        if one in candidates(problem, device):
            found = known[problem, device] = with_source(one, "given")
            return found
        if not pair and any(one in candidates(p, device) for p in _other_way(problem)):
            return usual()
        raise ValueError(
            f"the plan that triton_bn.use was given is no candidate of {problem} on {device.name}: {one}. "
            "layer.candidates(x) lists those."
        )

    return choosing(choose)


def _of_driver(driver: str, problem: Problem, device: Device, usual: Plan) -> Plan:
    for plan in candidates(problem, device):
        if plan.driver == driver:
            return with_source(plan, "given")
    return with_source(usual, f"{usual.source}: no {driver} plan here")


def _other_way(problem: Problem) -> Iterator[Problem]:
    """The problems of the other direction of the same batch norm: one of them is the layer's."""
    direction: Literal["forward", "backward"] = "forward"
    if problem.direction == "forward":
        direction = "backward"
    for residual, cumulative in product((False, True), repeat=2):
        yield replace(problem, direction=direction, residual=residual, cumulative=cumulative)


@contextmanager
def choosing(choose: Choose) -> Iterator[None]:
    """Meanwhile ``choose`` says which plan runs, in this thread and in the backward passes that it starts.

    It may choose what is no candidate: tests do. Within another one, ``usual()`` is what that one chooses.
    """
    global _choosing
    before = _current()
    outer = before or usual

    def chosen(problem: Problem, device: Device) -> Plan:
        return choose(problem, device, lambda: outer(problem, device))

    with _lock:
        _choosing += 1
    torch._C._stash_obj_in_tls(_KEY, chosen)
    try:
        yield
    finally:
        torch._C._stash_obj_in_tls(_KEY, before)
        with _lock:
            _choosing -= 1


def _current() -> Callable[[Problem, Device], Plan] | None:
    current: Callable[[Problem, Device], Plan] | None
    current = torch._C._get_obj_in_tls(_KEY) if torch._C._is_key_in_tls(_KEY) else None
    return current


def _chosen(problem: Problem, device: Device) -> Plan:
    memory.note(problem, device)
    return (_current() or usual)(problem, device)


# ---- Usual ---------------------------------------------------------------------------------------


def usual(problem: Problem, device: Device) -> Plan:
    """:func:`resolve` whatever is given: for what is launched on no call of the user's."""
    plan = memory.memo.get((problem, device))
    return _first(problem, device) if plan is None else plan


def _first(problem: Problem, device: Device) -> Plan:
    memo, recorded = memory.memo, memory.note(problem, device)
    plan = memory.on_disk(problem, device)
    if plan is None and _search_wanted(device):
        # Timing would break a capture. The next call outside of one searches.
        if recorded or _current() is not None or _capturing():
            return memory.untimed(problem, device)
        plan = _search_at_first_use(problem, device)
    plan = plan or memory.untimed(problem, device)
    memo[problem, device] = plan
    return plan


def _search_wanted(device: Device) -> bool:
    return os.environ.get("TRITON_BN_TUNE") == "1" and device.arch != "interpreter"


def _capturing() -> bool:
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _search_at_first_use(problem: Problem, device: Device) -> Plan | None:
    store = memory.store_of(device)
    try:
        best = search_once(problem, device).best
    except TimeoutError as error:
        cache.warn_once(store.path, "wait", str(error))
        return None
    if best is None:
        cache.warn_once(store.path, str(problem), f"no candidate for {problem} could be timed")
        return None
    return with_source(best.plan, "disk" if best.status == "remembered" else "tuned now")
