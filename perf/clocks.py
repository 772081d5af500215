"""How calls are timed: round by round over all providers of a case, under the same conditions."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from triton_bn.plan import Device

__all__ = ["Call", "Clock", "DeviceClock", "HostClock", "clock_for"]


@dataclass
class Call:
    """One call: ``run(prepare())``, of which ``run`` is timed, all of it within ``inside()``."""

    provider: str
    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    inside: Callable[[], AbstractContextManager[Any]] = nullcontext


class Clock(Protocol):
    """Times calls; a test brings its own."""

    def round(self, calls: Sequence[Call]) -> list[float]:
        """The milliseconds of each call, once, one after the other."""


class DeviceClock:
    """The GPU's time by events, its L2 emptied before each call.

    It is emptied by reading: after a write, the next kernel would pay for storing what was
    written. The GPU starts behind a delay as long as the host took to launch the last round, so
    that it never waits for the host within a call.
    """

    def __init__(self, device: torch.device) -> None:
        self.buffer = torch.ones(Device.current(device).cache, device=device)  # four times the L2
        self.delay = 5.0  # milliseconds

    def round(self, calls: Sequence[Call]) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in calls]
        torch.cuda._sleep(int(min(self.delay, 50.0) * 2e6))  # cycles, of 2 GHz at most
        begin = time.perf_counter()
        for call, (start, end) in zip(calls, events, strict=True):
            with call.inside():
                state = call.prepare()
                self.buffer.sum()
                start.record()
                call.run(state)
                end.record()
        self.delay = 1.2e3 * (time.perf_counter() - begin)
        torch.cuda.synchronize()
        return [start.elapsed_time(end) for start, end in events]


class HostClock:
    """The host's time: the mean of calls that are launched without waiting for the GPU."""

    calls = 50

    def round(self, calls: Sequence[Call]) -> list[float]:
        times = []
        for call in calls:
            torch.cuda.synchronize()
            with call.inside():
                begin = time.perf_counter()
                for _ in range(self.calls):
                    call.run(call.prepare())
                times.append(1e3 * (time.perf_counter() - begin) / self.calls)
        torch.cuda.synchronize()
        return times


def clock_for(measure: str, device: torch.device) -> Clock:
    return HostClock() if measure == "host" else DeviceClock(device)
