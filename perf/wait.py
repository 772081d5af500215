"""How long programs of one launch wait for one another: from publishing to having acquired.

A gang of programs works in rounds. In each every program stores a value, publishes it (a barrier, then
an atomic that releases), waits until all of the gang have (an atomic that acquires, again and again), and
reads what all have stored. That is what programs that share a channel would do once a launch.
A round's time is the difference of two launches of many and of few rounds, over the rounds between: the
launch itself is not in it. All gangs that fit do the same side by side, with so many programs a processor.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from perf.runner import Results, Row, about
from triton_bn.plan import Device

__all__ = ["A_PROCESSOR", "GANGS", "gang_kernel", "measure_all", "measure_one", "rounds"]

#: Programs of a gang; programs a processor.
GANGS, A_PROCESSOR = (2, 4, 8, 16, 32, 64, 128, 256), (1, 4)

#: Rounds of the short and of the long launch.
FEW, MANY = 100, 1100


@triton.jit
def gang_kernel(p_arrived, p_values, p_wrong, n_rounds, GANG: tl.constexpr):
    """
    p_arrived: int32 zeros [gangs * 32]: arrivals of each gang, on a cache line of its own.
    p_values:  float32 [2, gangs, GANG]: of even and of odd rounds. Who is a round ahead writes the other half.
    p_wrong:   int32 zeros [programs]: rounds in which a program read another sum than all have stored.
    """
    i_gang = tl.program_id(0) // GANG
    i_member = tl.program_id(0) % GANG
    n_values = tl.num_programs(0)
    members = tl.arange(0, GANG)
    wrong = 0
    for r in range(n_rounds):
        p_round = p_values + (r % 2) * n_values + i_gang * GANG
        tl.store(p_round + i_member, (i_member + r).to(tl.float32))
        tl.debug_barrier()
        tl.atomic_add(p_arrived + i_gang * 32, 1, sem="acq_rel")
        # In the condition, so that no compiler takes the load out of the loop.
        while tl.atomic_add(p_arrived + i_gang * 32, 0, sem="acquire") < GANG * (r + 1):
            pass
        tl.debug_barrier()
        total = tl.sum(tl.load(p_round + members), 0)
        expected = GANG * (GANG - 1) // 2 + GANG * r
        wrong += (total != expected).to(tl.int32)
    tl.store(p_wrong + tl.program_id(0), wrong)


def rounds(gang: int, gangs: int, n: int, device: torch.device) -> Tensor:
    """Runs n rounds: how often each program read something wrong, int32 [gangs * gang].

    All programs must run at the same time, which a cooperative launch makes sure of (or refuses).
    """
    arrived = torch.zeros(gangs * 32, dtype=torch.int32, device=device)
    values = torch.full((2, gangs, gang), torch.nan, device=device)
    wrong = torch.zeros(gangs * gang, dtype=torch.int32, device=device)
    options = {"num_warps": 4, "enable_fp_fusion": True}
    if torch.version.cuda:
        options["launch_cooperative_grid"] = True
    gang_kernel[(gangs * gang,)](arrived, values, wrong, n, GANG=gang, **options)
    return wrong


def timed(run: Callable[[], Any]) -> float:
    """Milliseconds of the GPU."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end))


def measure_one(
    gang: int,
    gangs: int,
    device: torch.device,
    clock: Callable[[Callable[[], Any]], float] = timed,
    repeats: int = 9,
) -> tuple[float, float, float]:
    """Microseconds of a round: the median, the least, the most.

    Raises:
        RuntimeError: where a program read what had not been stored yet.
    """
    times = []
    for repeat in range(repeats + 1):
        few = clock(lambda: rounds(gang, gangs, FEW, device))
        many = clock(lambda: rounds(gang, gangs, MANY, device))
        if repeat:  # the first compiles
            times.append(1e3 * (many - few) / (MANY - FEW))
    wrong = int(rounds(gang, gangs, FEW, device).sum())
    if wrong:
        raise RuntimeError(f"{wrong} reads of {gang} programs saw what was not published yet")
    return statistics.median(times), min(times), max(times)


def measure_all(
    results: Results,
    device: Device,
    *,
    again: bool = False,
    one: Callable[..., tuple[float, float, float]] = measure_one,
    say: Callable[[str], None] = print,
) -> None:
    """Measures all gangs that fit; each leaves a row, with its error where it did not run."""
    gpu = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = about(gpu)
    known = {
        (row["gang"], row["a_processor"])
        for row in results.waits
        if not again and all(row[name] == here[name] for name in ("gpu", "torch", "triton"))
    }
    for a_processor in A_PROCESSOR:
        for gang in GANGS:
            gangs = device.processors * a_processor // gang
            if not gangs or (gang, a_processor) in known:
                continue
            row: Row = {
                "gang": gang, "gangs": gangs, "a_processor": a_processor, "status": "measured",
                "us": None, "least_us": None, "most_us": None, **here,
            }  # fmt: skip
            try:
                row["us"], row["least_us"], row["most_us"] = one(gang, gangs, gpu)
                say(f"wait: {gang} programs, {a_processor} a processor: {row['us']:.2f} µs")
            except Exception as error:
                row["status"] = f"{type(error).__name__}: {error}"[:200]
                say(f"wait: {gang} programs, {a_processor} a processor: {row['status']}")
                if isinstance(error, torch.AcceleratorError):
                    results.add_wait(row)
                    raise
            results.add_wait(row)
