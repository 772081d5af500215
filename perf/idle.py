"""A GPU that is not there: kernels are compiled for it, and launching one does nothing.

What is left of a call is the host's part, but for Triton's launcher in C and the GPU's driver behind it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import triton
from triton.backends.compiler import GPUTarget

from triton_bn import plan, route, verbs

__all__ = ["Driver", "idle"]


class Driver:
    """Stands in for Triton's driver of an H200."""

    class utils:
        #: Module, function, registers, spills, threads. Triton loads a module that is None at every launch.
        load_binary = staticmethod(lambda *_: (1, 2, 64, 0, 1024))
        unload_module = staticmethod(lambda _: None)
        get_device_properties = staticmethod(
            lambda _: {"max_shared_mem": 232448, "multiprocessor_count": 132}
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *_: None

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextmanager
def idle(driver: Driver) -> Iterator[None]:
    """Meanwhile CPU tensors are taken for a GPU's; what the kernels would have written is left unwritten."""

    def on_gpu(_: Any) -> bool:
        return True

    def current(_: Any) -> plan.Device:
        return plan.DEVICES["H200"]

    active = triton.runtime.driver
    try:
        before = active.active
    except RuntimeError:  # no GPU: whoever asks next shall hear so again
        before = None
    active.set_active(driver)
    try:
        with (
            mock.patch.object(route, "on_gpu", on_gpu),
            mock.patch.object(verbs, "use_kernels", on_gpu),
            mock.patch.object(plan.Device, "current", current),
        ):
            yield
    finally:
        active.set_active(before)
