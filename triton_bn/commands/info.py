"""``python -m triton_bn info``: versions, devices, caches, and what would run where."""

from __future__ import annotations

import argparse
import platform

import torch
import triton

from triton_bn.launch import interpreting
from triton_bn.plan import Device
from triton_bn.tuning import cache
from triton_bn.version import __version__

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None: there is nothing to choose."""


def run(args: argparse.Namespace) -> int:
    lines = [
        ("triton_bn", __version__),
        ("torch", torch.__version__),
        ("triton", triton.__version__),
        ("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *_devices(),
        ("interpreter", "on" if interpreting() else "off (TRITON_INTERPRET=1 turns it on)"),
        *_destinations(),
        ("plans kept in", str(cache.folder())),
        ("kernels kept in", triton.knobs.cache.dir),
    ]
    width = max(len(name) for name, _ in lines)
    for name, text in lines:
        print(f"{name:{width}}  {text}")
    return 0


def _devices() -> list[tuple[str, str]]:
    if not torch.cuda.is_available():
        return [("GPU", "none that torch sees")]
    found = []
    for index in range(torch.cuda.device_count()):
        device = Device.current(torch.device("cuda", index))
        units = "compute units" if torch.version.hip else "SMs"
        found.append(
            (
                f"GPU {index}",
                f"{device.name} ({device.arch}), {device.processors} {units}, "
                f"{device.cache / 2**20:g} MiB of L2",
            )
        )
    return found


def _destinations() -> list[tuple[str, str]]:
    if interpreting():
        return [("any tensor", "the kernels, in Triton's interpreter")]
    return [("CPU tensors", "plain torch"), ("GPU tensors", "the compiled kernels")]
