"""What kernels do to memory, watched in Triton's interpreter: every access of every launch, in every test.

An access outside of all tensors of its launch, or across two of them, raises :class:`Stray`. What a load
without ``other=`` masks off reads as NaN (integers: their largest), where the interpreter alone would give 0:
on a GPU it is whatever was in the register.

Others look on by :func:`watched`, and :data:`loop` says in which order the programs of a launch run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from triton.runtime import interpreter
from triton.runtime.errors import InterpreterError
from triton.runtime.interpreter import interpreter_builder as builder


class Stray(Exception):
    """An access outside of all tensors."""


@dataclass(eq=False)
class Region:
    """A tensor's memory: its first address, the bytes of a value, and how many values it reaches over."""

    name: str
    begin: int
    size: int
    length: int


class Access(NamedTuple):
    """Before it happens: what a program is about to do."""

    kind: str  #: "load", "store", "atomic" or "barrier"
    region: Region | None = None  #: None where no lane is active, and for a barrier
    indices: np.ndarray | None = None  #: of the active lanes' values in the region
    order: str = ""  #: an atomic's memory order: "RELAXED", "ACQUIRE", "RELEASE", "ACQUIRE_RELEASE"
    adds: bool = False  #: whether an atomic adds anything but 0


class Launch(NamedTuple):
    kernel: str
    programs: int
    regions: list[Region]


#: The launch that is running.
current: list[Launch] = []
_watchers: list[Callable[[Access], None]] = []


def in_order(launch: Launch, program: Callable[[int], None]) -> None:
    for i in range(launch.programs):
        program(i)


#: Runs the programs of a launch.
loop: list[Callable[[Launch, Callable[[int], None]], None]] = [in_order]


@contextmanager
def looped(by: Callable[[Launch, Callable[[int], None]], None]) -> Iterator[None]:
    """Meanwhile the programs of each launch are run by ``by(launch, program)``."""
    loop.append(by)
    try:
        yield
    finally:
        loop.remove(by)


@contextmanager
def watched(watcher: Callable[[Access], None]) -> Iterator[None]:
    """Meanwhile ``watcher`` is told of every access before it happens."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


def regions(names: Sequence[str], arguments: Sequence[Any]) -> list[Region]:
    """The memory of the tensors among a kernel's arguments; of one passed twice the first counts."""
    found: list[Region] = []
    for name, value in zip(names, arguments, strict=False):
        if isinstance(value, tuple):
            found += regions([f"{name}[{i}]" for i in range(len(value))], value)
        elif isinstance(value, Tensor) and value.numel():
            reach = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
            name = name.removeprefix("p_")
            found.append(Region(name, value.data_ptr(), value.element_size(), reach))
    return found


def _locate(pointers: Any, mask: Any) -> tuple[Region | None, np.ndarray | None]:
    """The tensor that an access is to, and which of its values."""
    data = pointers.data
    active = data.ravel() if mask is None else data[np.broadcast_to(mask.data, data.shape)]
    if not active.size:
        return None, None
    addresses = active.astype(np.int64)
    first, last = addresses.min(), addresses.max()
    for region in current[-1].regions:
        if first >= region.begin and last < region.begin + region.size * region.length:
            indices, rest = np.divmod(addresses - region.begin, region.size)
            if rest.any():
                raise Stray(f"{current[-1].kernel}: {region.name} is accessed between its values")
            return region, indices
    near = min(current[-1].regions, key=lambda r: abs(int(first) - r.begin))
    places = [int(a - near.begin) // near.size for a in (first, last)]
    raise Stray(
        f"{current[-1].kernel}: an access outside of all tensors, at {places} of {near.name}, "
        f"which has {near.length} values"
    )


def install() -> None:
    """Watches from now on, until the process ends."""
    load, store = builder.create_masked_load, builder.create_masked_store
    atomic, barrier = builder.create_atomic_rmw, builder.create_barrier

    def see(access: Access) -> None:
        for watcher in _watchers:
            watcher(access)

    def watched_load(pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        see(Access("load", *_locate(pointers, mask)))
        value = load(pointers, mask, other, *rest)
        if other is None and not mask.data.all():
            kind = value.data.dtype
            # The largest of the 16 bits by which the interpreter holds a bfloat16 is a NaN.
            poison = np.nan if kind.kind == "f" else kind.kind == "b" or np.iinfo(kind).max
            value.data[~np.broadcast_to(mask.data, value.data.shape)] = poison
        return value

    def watched_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        see(Access("store", *_locate(pointers, mask)))
        return store(pointers, value, mask, *rest)

    def watched_atomic(operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        adds, order = bool(np.asarray(value.data).any()), rest[0].name
        see(Access("atomic", *_locate(pointers, mask), order, adds))
        return atomic(operation, pointers, value, mask, *rest)

    def watched_barrier(*rest: Any) -> Any:
        see(Access("barrier"))
        return barrier(*rest)

    def call(executor: Any, *arguments: Any, **options: Any) -> None:
        """GridExecutor.__call__, for tensors on the CPU and a grid of one dimension."""
        fn, (programs,) = executor.fn, executor.grid
        known = inspect.signature(fn).parameters
        options = {name: value for name, value in options.items() if name in known}
        scope = interpreter._patch_lang(fn)
        current.append(
            Launch(fn.__name__, programs, regions(executor.arg_names, arguments)),
        )
        try:
            given = inspect.getcallargs(fn, *arguments, **options)
            given = {
                name: value if name in executor.constexprs else interpreter._implicit_cvt(value)
                for name, value in given.items()
            }
            builder.set_grid_dim(programs, 1, 1)

            def program(i: int) -> None:
                builder.set_grid_idx(i, 0, 0)
                try:
                    fn(**given)
                except InterpreterError as error:  # some versions of Triton wrap what was raised
                    cause: BaseException = error
                    while cause.__cause__ is not None:
                        cause = cause.__cause__
                    raise cause from None

            loop[-1](current[-1], program)
        finally:
            current.pop()
            scope.restore()

    builder.create_masked_load, builder.create_masked_store = watched_load, watched_store
    builder.create_atomic_rmw, builder.create_barrier = watched_atomic, watched_barrier
    interpreter.GridExecutor.__call__ = call
