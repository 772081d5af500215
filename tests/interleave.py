"""The programs of a launch interleaved, as on a GPU, in Triton's interpreter: data races and deadlocks.

    with interleaved(seed=1, resident=3) as log:
        ...                                     # anything that launches kernels
    assert not log.races

Each program is a thread, of which one runs at a time; before every load, store, atomic and barrier a seeded
schedule picks who goes on. ``resident`` programs are alive at a time, as many as a GPU has room for; the next
starts when one ends. A program that polls (adds 0 atomically) what has not changed since it last did waits
until somebody changes it; where all wait, that is a :class:`Deadlock`.

Races are found by happens-before, whatever the schedule was: two accesses of one value by two programs, one of
them a store, without a chain of barrier, release, acquire and barrier between them. (A release publishes what
all threads of a program did before its last barrier; what an acquire saw, all of them know from the next one.)
The bookkeeping is that of vector clocks: Lamport, "Time, clocks, and the ordering of events ..." (1978).
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import memory
import numpy as np
from memory import Access, Launch, Region
from triton.runtime.interpreter import interpreter_builder as builder


class Deadlock(Exception):
    """All programs that run wait for what none of them will do."""


class _Stopped(BaseException):
    """Ends the thread of a program whose launch has failed."""


@dataclass
class Log:
    """Over all launches: races as (kernel, tensor, kind), and how often the schedule switched."""

    races: set[tuple[str, str, str]] = field(default_factory=set)
    switches: int = 0


class _Program:
    def __init__(self, number: int) -> None:
        self.number = number
        self.turn = threading.Semaphore(0)
        self.thread: threading.Thread | None = None
        self.ended = False
        self.awaits: tuple[int, int] | None = None  #: the value that it polls without any change
        self.seen: dict[
            tuple[int, int], int
        ] = {}  #: by value, its version at this program's last poll


class _Clocks:
    """Who knows of which access to a tensor's values: version numbers of each program's past."""

    def __init__(self, region: Region, programs: int) -> None:
        self.writer = np.full(region.length, -1)
        self.written = np.zeros(region.length, np.int64)
        self.read = np.zeros((programs, region.length), np.int64)
        self.plain = np.zeros(region.length, bool)
        self.atomic = np.zeros(region.length, bool)


class _Schedule:
    """One launch."""

    def __init__(self, launch: Launch, log: Log, chance: random.Random, resident: int) -> None:
        self.launch, self.log, self.chance = launch, log, chance
        self.programs = [_Program(i) for i in range(launch.programs)]
        self.waiting = self.programs[::-1]
        self.resident = resident
        self.live: list[_Program] = []
        self.current = self.programs[0]
        self.error: BaseException | None = None
        self.over = threading.Event()
        n = launch.programs
        self.knows = np.eye(n, dtype=np.int64)  # [program, of whom]: what all its threads know
        self.published = np.zeros((n, n), np.int64)  # as it was at its last barrier
        self.acquired = np.zeros((n, n), np.int64)  # known to one thread, until the next barrier
        self.released: dict[tuple[int, int], np.ndarray] = {}  # by atomic value
        self.version: dict[tuple[int, int], int] = {}
        self.clocks: dict[int, _Clocks] = {}

    # ---- who goes on ----

    def run(self, program: Callable[[int], None]) -> None:
        self.program = program
        self.go_on(self.choose())
        self.over.wait()
        for each in self.programs:
            if each.thread is not None:
                each.thread.join()
        if self.error is not None:
            raise self.error

    def choose(self) -> _Program:
        while self.waiting and len(self.live) < self.resident:
            self.live.append(self.waiting.pop())
        ready = [p for p in self.live if p.awaits is None]
        if not ready:
            alive = [p.number for p in self.live]
            raise Deadlock(f"{self.launch.kernel}: programs {alive} wait for one another")
        return self.chance.choice(ready)

    def go_on(self, program: _Program) -> None:
        self.current = program
        builder.set_grid_idx(program.number, 0, 0)
        if program.thread is None:
            program.thread = threading.Thread(target=self.body, args=(program,), daemon=True)
            program.thread.start()
        else:
            program.turn.release()

    def body(self, me: _Program) -> None:
        try:
            self.program(me.number)
        except BaseException as error:
            self.error = self.error or error
        me.ended = True
        self.live.remove(me)
        if self.error is None and (self.live or self.waiting):
            try:
                self.go_on(self.choose())
                return
            except Deadlock as error:
                self.error = error
        alive = [p for p in self.live if p.thread is not None and not p.ended]
        if alive and self.error is not None:
            alive[0].turn.release()  # which finds the error, stops, and comes here
        else:
            self.over.set()

    def switch(self) -> None:
        me, following = self.current, self.choose()
        if following is not me:
            self.log.switches += 1
            self.go_on(following)
            me.turn.acquire()
            if self.error is not None:
                raise _Stopped

    # ---- what they do ----

    def access(self, access: Access) -> None:
        me = self.current
        polls = access.kind == "atomic" and not access.adds
        if not polls:
            me.seen.clear()
        self.switch()
        region, indices, p = access.region, access.indices, me.number
        if access.kind == "barrier":
            self.knows[p] = np.maximum(self.knows[p], self.acquired[p])
            self.published[p] = self.knows[p]
            self.knows[p, p] += 1
        if region is None or indices is None:
            return
        if region.begin not in self.clocks:
            self.clocks[region.begin] = _Clocks(region, self.launch.programs)
        clocks = self.clocks[region.begin]
        if access.kind == "atomic":
            self.atomic(me, access, clocks, (region.begin, int(indices[0])), polls)
            return
        writer = clocks.writer[indices]
        unknown = clocks.written[indices] > self.knows[p][writer]
        if (unknown & (writer >= 0) & (writer != p)).any():
            self.race(region, f"store-{access.kind}")
        if access.kind == "store":
            others = clocks.read[:, indices] > self.knows[p][:, None]
            others[p] = False
            if others.any():
                self.race(region, "load-store")
            clocks.writer[indices], clocks.written[indices] = p, self.knows[p, p]
        else:
            clocks.read[p, indices] = self.knows[p, p]
        clocks.plain[indices] = True
        if clocks.atomic[indices].any():
            self.race(region, f"atomic-{access.kind}")

    def atomic(
        self, me: _Program, access: Access, clocks: _Clocks, value: tuple[int, int], polls: bool
    ) -> None:
        p, version = me.number, self.version.get(value, 0)
        if polls and me.seen.get(value) == version:
            me.awaits = value
            self.switch()  # and is chosen again when somebody has changed it
        clocks.atomic[access.indices] = True
        if clocks.plain[access.indices].any() and access.region is not None:
            self.race(access.region, "plain-atomic")
        if "ACQUIRE" in access.order:
            self.acquired[p] = np.maximum(self.acquired[p], self.released.get(value, 0))
        if "RELEASE" in access.order:
            self.released[value] = np.maximum(self.released.get(value, 0), self.published[p])
        if polls:
            me.seen[value] = self.version.get(value, 0)
            return
        self.version[value] = version + 1
        for other in self.live:
            if other.awaits == value:
                other.awaits = None

    def race(self, region: Region, kind: str) -> None:
        self.log.races.add((self.launch.kernel, region.name, kind))


@contextmanager
def interleaved(seed: int = 0, resident: int = 4) -> Iterator[Log]:
    """Meanwhile the programs of every launch are interleaved; what is seen of them is logged."""
    log, chance = Log(), random.Random(seed)
    running: list[_Schedule] = []

    def loop(launch: Launch, program: Callable[[int], None]) -> None:
        running.append(_Schedule(launch, log, chance, resident))
        try:
            running[-1].run(program)
        finally:
            running.pop()

    with memory.looped(loop), memory.watched(lambda access: running[-1].access(access)):
        yield log
