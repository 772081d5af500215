"""Who computes a call: the kernels, the registered operators, or PyTorch's own operators."""

from __future__ import annotations

import os
import warnings
from functools import cache
from importlib.util import find_spec
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor
from torch._C import _is_tracing, _len_torch_dispatch_stack
from torch._C._functorch import get_dynamic_layer_stack_depth
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad

__all__ = ["INTERPRETED", "TRITON", "kernels", "on_gpu", "readable", "route", "transformed"]

#: Whether Triton is installed. It is there for Linux, and for Windows as the package triton-windows.
TRITON = find_spec("triton") is not None
#: Whether the kernels run in Triton's interpreter, so that they take CPU tensors.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def route(
    input: Tensor, *others: Tensor | None, batch_statistics: bool, shared: bool = False
) -> Literal["kernels", "operators", "torch"]:
    """Who computes a call.

    ==========================================================  ==========================================
    the call                                                    is computed by
    ==========================================================  ==========================================
    a CPU tensor; meta tensors; other devices                   PyTorch's own operators
    a GPU tensor, eager                                         the kernels
    torch.export, ONNX, torch.jit.trace                         PyTorch's own operators
    torch.func, forward-mode AD                                 PyTorch's own operators
    torch.compile, running statistics                           PyTorch's own operators: they fuse and fold
    torch.compile, batch statistics, on a GPU                   the operators ``torch.ops.triton_bn.*``
    tensor subclasses (DTensor, say)                            PyTorch's own operators
    under a dispatch mode (fake tensors, loggers), on a GPU     the operators ``torch.ops.triton_bn.*``
    ==========================================================  ==========================================

    With ``TRITON_INTERPRET=1`` a CPU tensor counts as one on a GPU in every row.

    Args:
        input: what is to be normalized; where it is decides first, so that on a CPU nothing else is looked at.
        others: the other tensors of the call, or ``None``: any of them may be of a subclass.
        batch_statistics: whether the call normalizes by the statistics of its batch (training).
        shared: the batch is shared with other processes, which no operator of PyTorch's does on every device:
            the kernels or, on a CPU, the halves of :mod:`triton_bn.reference` are called, ``"kernels"``, or
            the operators that stand for them.
    """
    if not (shared or on_gpu(input)):
        if input.is_cuda and not torch.compiler.is_compiling():
            _warn_of_missing_triton()
        return "torch"
    if torch.compiler.is_compiling():
        # Not is_exporting(): dynamo of some releases takes that for true whatever it compiles for.
        exporting = torch.compiler._is_exporting_flag
        ours = batch_statistics and not exporting and not transformed()
        return "operators" if ours or shared else "torch"
    if (_is_tracing() or transformed()) and not shared:
        return "torch"
    kinds = {*map(type, (input, *others))}
    if not kinds <= _PLAIN:
        return "operators" if shared or kinds <= _WITHOUT_DATA else "torch"
    return "operators" if _len_torch_dispatch_stack() > 0 else "kernels"


_PLAIN = {Tensor, torch.nn.Parameter, type(None)}
_WITHOUT_DATA = _PLAIN | {FakeTensor, FunctionalTensor}


def on_gpu(x: Tensor) -> bool:
    """Whether the kernels can take a tensor: on a GPU, or on the CPU under TRITON_INTERPRET=1."""
    return (x.is_cuda and TRITON) or (INTERPRETED and x.device.type == "cpu")


def readable(x: Tensor) -> bool:
    """Whether the values of a tensor can be looked at, without waiting for a device."""
    return (
        x.device.type == "cpu"
        and type(x) in _PLAIN
        and not torch.compiler.is_compiling()
        and not _is_tracing()
        and not transformed()
        and _len_torch_dispatch_stack() == 0
    )


@cache
def kernels() -> ModuleType:
    """:mod:`triton_bn.launch`, imported at the first launch: Triton and the kernels take a fifth of a second.

    Raises:
        ModuleNotFoundError: where Triton is not installed.
        RuntimeError: where TRITON_INTERPRET has changed since this package was imported.
    """
    from triton_bn import launch

    if launch.interpreting() != INTERPRETED:
        raise RuntimeError(
            "TRITON_INTERPRET was changed after triton_bn was imported: set it before"
        )
    return launch


@cache
def _warn_of_missing_triton() -> None:
    """Once a process."""
    text = "triton_bn: Triton is not installed, so PyTorch's own operators compute on this GPU"
    warnings.warn(text, stacklevel=2)


def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work."""
    return get_dynamic_layer_stack_depth() > 0 or forward_ad._current_level >= 0


# Asked while dynamo traces; it guards the transforms itself. What torch.compiler.assume_constant_result(transformed)
# does, without importing dynamo: that takes a second.
_marked: Any = transformed
_marked._dynamo_marked_constant = True
