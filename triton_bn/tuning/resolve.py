"""Which plan runs a problem.

:func:`resolve` answers from memory, then from the user's file on disk, then from a table shipped
for the GPU, then by :func:`triton_bn.plan.heuristic` (:mod:`triton_bn.tuning.memory`). Nothing is timed
unless somebody asks: by :func:`triton_bn.tune`, on the command line, or by ``TRITON_BN_TUNE=1`` in the
environment. That searches when a problem that has no plan on disk is first met.
"""

from __future__ import annotations

import os

import torch

from triton_bn.plan import Device, Plan, with_source
from triton_bn.problem import Problem
from triton_bn.tuning import cache, memory
from triton_bn.tuning.search import search_once

__all__ = ["resolve"]


def resolve(problem: Problem, device: Device) -> Plan:
    """The plan to launch. Its ``source``: "heuristic", "shipped", "disk" or "tuned now"."""
    plan = memory.memo.get((problem, device))
    return _first(problem, device) if plan is None else plan


def _first(problem: Problem, device: Device) -> Plan:
    plan = memory.on_disk(problem, device)
    if plan is None and _search_wanted(device):
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            # Timing would break the capture. The next call outside of one searches.
            return memory.untimed(problem, device)
        plan = _search_at_first_use(problem, device)
    plan = plan or memory.untimed(problem, device)
    memory.memo[problem, device] = plan
    return plan


def _search_wanted(device: Device) -> bool:
    wanted = os.environ.get("TRITON_BN_TUNE") == "1" and not memory.recording
    return wanted and device.arch != "interpreter"


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
