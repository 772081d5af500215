"""What a call costs the host: from the second call on, a launch is one look-up, and finds what Triton would.

In processes of their own, with compiled kernels and a driver that launches nothing.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from perf.plots import host, load
from triton_bn import launch

DRIVER = """
import torch
from triton.runtime.jit import JITFunction
import triton_bn
from perf import idle

launched, kernels, slow = [], [], []


class Driver(idle.Driver):
    def launcher_cls(self, source, metadata):
        compiled = source.name, repr(source.signature), repr(source.constants), repr(source.attrs)

        def launch(*arguments):
            launched.append(arguments)
            kernels.append(compiled)

        return launch


def counted(self, *arguments, _run=JITFunction.run, **options):
    slow.append(self)
    return _run(self, *arguments, **options)


JITFunction.run = counted
meanwhile = idle.idle(Driver())
meanwhile.__enter__()


"""

SECOND = """
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


#: Each call differs from the one before it in one thing that decides which kernel is right.
KEY = """
import contextlib
import triton
from triton_bn import launch

seen = []
triton.knobs.runtime.jit_cache_hook = lambda **given: seen.append(given["compile"]) and None


def call(
    what, shape=(8, 5, 3, 3), dtype=torch.float16, shift=0, weight=0, mean=0, needs=True, activation=None, driver=None,
    parameters=torch.float32, without="",
):
    memory = torch.randn(8 * 5 * 9 + 8).to(dtype)
    x = memory[shift : shift + 8 * 5 * 9].view(shape).requires_grad_()
    layer = triton_bn.BatchNorm2d(shape[1], activation=activation)
    layer.weight = torch.nn.Parameter(torch.ones(shape[1] + 4)[weight : weight + shape[1]])
    layer.weight.requires_grad_(needs)
    layer.running_mean = torch.ones(shape[1] + 4)[mean : mean + shape[1]]
    layer.to(parameters)
    if without:
        setattr(layer, without, None)
    kernels.clear()
    with triton_bn.use(driver) if driver else contextlib.nullcontext():
        layer(x).backward(torch.ones_like(x))
    return what, list(kernels)


CALLS = [
    dict(what="plain"),
    dict(what="constants: an activation", activation="relu"),
    dict(what="constants: another one", activation="relu6"),
    dict(what="constants: a parameter", activation=triton_bn.Activation("leaky_relu", 0.5)),
    dict(what="constants: another parameter", activation=triton_bn.Activation("leaky_relu", 0.25)),
    dict(what="dtype", dtype=torch.bfloat16),
    dict(what="alignment of the input, of which no constant tells", shift=1),
    dict(what="alignment of the weight, which 8 bytes are not", weight=2),
    dict(what="dtype of the parameters", parameters=torch.float16),
    dict(what="no weight", without="weight"),
    dict(what="no bias", without="bias"),
    dict(what="alignment of a running statistic", mean=1),
    dict(what="a gradient that is not needed", needs=False),
    dict(what="sizes", shape=(4, 10, 3, 3)),
    dict(what="driver", driver="split"),
    dict(what="alignment of the input, split", driver="split", shift=1),
    dict(what="alignment of a running statistic, split", driver="split", mean=1),
    dict(what="a gradient that is not needed, split", driver="split", needs=False),
]
found = [call(**each) for each in CALLS]
again = [call(**each) for each in CALLS]
right = []
for each in CALLS:  # as Triton looks them up
    for prepared in (launch._forward_launches, launch._normalize_launch, launch._backward_launches):
        prepared.cache_clear()
    right.append(call(**each))
for a, b, c in zip(found, again, right):
    assert a == b == c, f"{c[0]}: launched {a[1]} and {b[1]}, right is {c[1]}"
assert len({str(kernels) for _, kernels in right}) == len(CALLS), "two of the calls are no different"
assert seen, "Triton's hook was never asked"
print("done")
"""


def run(body: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(DRIVER + body)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.stdout.strip() == "done", done.stderr


def test_the_second_call_finds_its_launches_by_one_look_up() -> None:
    run(SECOND)


def test_a_launch_is_the_one_that_triton_would_find() -> None:
    """Constants, dtypes, alignment and sizes are all in the key; and Triton's hooks, which get the constants
    as JSON, are served."""
    run(KEY)


def test_perf_host_prints_a_ratio_for_each_target_and_rows_of_which_plots_draws(
    tmp_path: Path,
) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "perf",
        "host",
        "--rounds=2",
        "--calls=2",
        f"--output={tmp_path}",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()[2:]]
    assert [line[-1] for line in lines if line[-2] == "<="] == ["1.3", "1.3", "1.3", "1.6", "1.5"]
    data = load(tmp_path)
    assert len(data.rows) == 7
    assert {"triton_bn", "triton_bn split", "torch eager"} == set(data.rows["provider"])
    assert host(data).axes


def test_a_launch_belongs_to_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same launch on another device is another binary's."""

    class Kernel:
        """Stands in for a compiled kernel: each look-up gives a launcher of its own."""

        arg_names = ("p_x",)

        def __init__(self) -> None:
            self.launched: list[object] = []

        def __getitem__(self, grid: object) -> Callable[..., dict[object, object]]:
            launcher = object()
            return lambda *_: {(1, 1, 1): lambda *_: self.launched.append(launcher)}

    monkeypatch.setattr(launch, "interpreting", lambda: False)
    kernel = Kernel()
    wanted = launch.Launch(kernel, 1, (), {})
    for device in (0, 1, 0, 1, 0):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        tensor: Any = SimpleNamespace(
            get_device=torch.cuda.current_device, dtype=torch.half, data_ptr=lambda: 0
        )
        launch.run(wanted, (tensor,), (tensor,))
    first, second, third = kernel.launched
    assert first is third
    assert first is not second
