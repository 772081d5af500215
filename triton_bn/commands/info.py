"""``triton-bn info``: versions, devices, caches, and what would run where."""

from __future__ import annotations

import argparse
import platform
from importlib.metadata import version

import torch

from triton_bn.commands.arguments import add_json, print_json
from triton_bn.plan import Device
from triton_bn.route import INTERPRETED, TRITON
from triton_bn.tuning import cache
from triton_bn.version import __version__

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    lines = {
        "triton_bn": __version__,
        "torch": str(torch.__version__),
        "triton": version("triton") if TRITON else "not installed",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        **_devices(),
        "interpreter": "on" if INTERPRETED else "off (TRITON_INTERPRET=1 turns it on)",
        **_destinations(),
        "plans kept in": str(cache.folder()),
        **_compiled(),
    }
    if args.json:
        print_json(lines)
        return 0
    width = max(map(len, lines))
    for name, text in lines.items():
        print(f"{name:{width}}  {text}")
    return 0


def _compiled() -> dict[str, str]:
    if not TRITON:
        return {}
    from triton import knobs

    return {"kernels kept in": str(knobs.cache.dir)}


def _devices() -> dict[str, str]:
    if not torch.cuda.is_available():
        return {"GPU": "none that torch sees"}
    return {
        f"GPU {index}": str(Device.current(torch.device("cuda", index)))
        for index in range(torch.cuda.device_count())
    }


def _destinations() -> dict[str, str]:
    if not TRITON:
        return {"any tensor": "PyTorch's own operators"}
    if INTERPRETED:
        return {"any tensor": "the kernels, in Triton's interpreter"}
    return {"CPU tensors": "PyTorch's own operators", "GPU tensors": "the compiled kernels"}
