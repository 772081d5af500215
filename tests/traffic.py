"""The traffic meter: what each kernel really reads and writes, counted in Triton's interpreter.

Lanes that are masked off do not count, and lanes that ask for the same address in one access
count once, as on a GPU. Caches are not modelled: what is counted are the values that a kernel asks
for, in all (``total``) and each address once (``distinct``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor
from triton.runtime.interpreter import interpreter_builder

from triton_bn import launch


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


@dataclass
class _Region:
    """A tensor's memory, and how often each of its values was loaded and stored."""

    name: str
    begin: int
    size: int
    loads: np.ndarray
    stores: np.ndarray


@contextmanager
def metered() -> Iterator[list[Traffic]]:
    """Meanwhile, the traffic of every launch is listed."""
    launches: list[Traffic] = []
    regions: list[_Region] = []
    builder = interpreter_builder
    run, load, store = launch.run, builder.create_masked_load, builder.create_masked_store
    atomic = builder.create_atomic_rmw

    def count(pointers: Any, mask: Any, what: str) -> None:
        lanes = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        addresses = np.unique(lanes.astype(np.int64))
        if not addresses.size:
            return
        for region in regions:
            offsets, rest = np.divmod(addresses - region.begin, region.size)
            counts = getattr(region, what)
            if offsets[0] >= 0 and offsets[-1] < len(counts):
                assert not rest.any(), f"{region.name} is accessed between its values"
                counts[offsets] += 1
                return
        raise AssertionError(f"{launches[-1].kernel}: an access outside of all tensors")

    def counted_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask, "loads")
        return load(pointers, mask, *rest)

    def counted_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask, "stores")
        return store(pointers, value, mask, *rest)

    def counted_atomic(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        count(pointers, mask, "loads")
        count(pointers, mask, "stores")
        return atomic(operation, pointers, value, mask, *rest)

    def counted_run(kernel: Any, programs: int, arguments: Any, constants: dict[str, Any]) -> None:
        launches.append(Traffic(kernel.__name__, programs))
        regions[:] = _regions(kernel.arg_names, arguments)
        run(kernel, programs, arguments, constants)
        for region in regions:
            for what in ("loads", "stores"):
                counts = getattr(region, what)
                if counts.any():
                    total, distinct = int(counts.sum()), int(np.count_nonzero(counts))
                    moved = Bytes(total * region.size, distinct * region.size)
                    getattr(launches[-1], what)[region.name] = moved

    launch.run = counted_run
    builder.create_masked_load, builder.create_masked_store = counted_load, counted_store
    builder.create_atomic_rmw = counted_atomic
    try:
        yield launches
    finally:
        launch.run = run
        del builder.create_masked_load, builder.create_masked_store, builder.create_atomic_rmw


def _regions(names: Sequence[str], arguments: Sequence[Any]) -> list[_Region]:
    """The memory of the tensors among a kernel's arguments; of one passed twice the first counts."""
    found: list[_Region] = []
    for name, value in zip(names, arguments, strict=False):
        if isinstance(value, tuple):
            found += _regions([f"{name}[{i}]" for i in range(len(value))], value)
        elif isinstance(value, Tensor):
            reach = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
            counts = np.zeros((2, reach), np.int64)
            name, size = name.removeprefix("p_"), value.element_size()
            found.append(_Region(name, value.data_ptr(), size, counts[0], counts[1]))
    return found
