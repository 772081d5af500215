"""The traffic meter: what each kernel really reads and writes, counted in Triton's interpreter.

Lanes that are masked off do not count, and lanes that ask for the same address in one access
count once, as on a GPU. Caches are not modelled: what is counted are the values that a kernel asks
for, in all (``total``) and each address once (``distinct``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import memory
import numpy as np


@dataclass(frozen=True)
class Bytes:
    total: int = 0
    distinct: int = 0


@dataclass
class Traffic:
    """Of one launch: bytes loaded from and stored to each tensor argument that is touched."""

    kernel: str
    programs: int
    loads: dict[str, Bytes] = field(default_factory=dict)
    stores: dict[str, Bytes] = field(default_factory=dict)


@contextmanager
def metered() -> Iterator[list[Traffic]]:
    """Meanwhile, the traffic of every launch is listed."""
    launches: list[Traffic] = []
    counts: dict[tuple[memory.Region, str], np.ndarray] = {}

    def count(access: memory.Access) -> None:
        if access.region is None or access.indices is None:
            return
        for what in {"load": ["loads"], "store": ["stores"]}.get(access.kind, ["loads", "stores"]):
            key = access.region, what
            if key not in counts:
                counts[key] = np.zeros(access.region.length, np.int64)
            counts[key][np.unique(access.indices)] += 1

    def run(launch: memory.Launch, program: Callable[[int], None]) -> None:
        launches.append(Traffic(launch.kernel, launch.programs))
        counts.clear()
        before(launch, program)
        for (region, what), each in counts.items():
            moved = Bytes(int(each.sum()) * region.size, int(np.count_nonzero(each)) * region.size)
            getattr(launches[-1], what)[region.name] = moved

    before = memory.loop[-1]
    with memory.watched(count), memory.looped(run):
        yield launches
