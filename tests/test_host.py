"""What a call costs the host: from the second call on, a launch is one look-up.

In a process of its own, with compiled kernels and a driver that launches nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

SCRIPT = """
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
import triton_bn
from triton_bn import plan, route

launched, slow = [], []


class Driver:
    class utils:
        load_binary = staticmethod(lambda *a: (None, 2, 64, 0, 1024))
        get_device_properties = staticmethod(lambda d: {"max_shared_mem": 232448, "multiprocessor_count": 132})

    def launcher_cls(self, source, metadata):
        return lambda *arguments: launched.append(arguments)

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def counted(self, *arguments, _run=JITFunction.run, **options):
    slow.append(self)
    return _run(self, *arguments, **options)


triton.runtime.driver.set_active(Driver())
JITFunction.run = counted
route.use_kernels = lambda x: True
plan.Device.current = staticmethod(lambda device: plan.DEVICES["H200"])


def call(layer, x):
    launched.clear()
    slow.clear()
    layer(x).backward(torch.ones_like(x))
    return len(slow), [tuple(map(kind, arguments)) for arguments in launched]


def kind(value):
    if isinstance(value, tuple):
        return tuple(map(kind, value))
    if isinstance(value, (int, float, str, bool)) or value is None:
        return value
    return value.shape if isinstance(value, torch.Tensor) else type(value)


layer = triton_bn.BatchNorm2d(16, activation="relu")
x = torch.randn(8, 16, 4, 4, requires_grad=True)
first = call(layer, x)
second = call(layer, x)
assert first[0] == 2, first
assert second[0] == 0, "the second call went through Triton's own look-up again"
assert first[1] == second[1], "both must launch the same"
assert call(layer, torch.randn(9, 16, 4, 4, requires_grad=True))[0] == 2, "another batch, another launch"
assert call(layer.bfloat16().float(), x)[0] == 0
assert call(layer.eval(), x)[0] == 3
shifted = torch.randn(8 * 16 * 16 + 1)[1:].view(8, 16, 4, 4).requires_grad_()
assert call(layer.train(), shifted)[0] == 2, "a misaligned input must not meet kernels for an aligned one"
print("done")
"""


def test_the_second_call_finds_its_launches_by_one_look_up() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.stdout.strip() == "done", done.stderr
