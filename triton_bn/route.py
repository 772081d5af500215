"""Where a call goes: to the kernels, to the registered operators, or to PyTorch's own operators."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from triton_bn import launch

__all__ = ["transformed", "use_kernels", "watched"]


def use_kernels(x: Tensor) -> bool:
    """Whether a tensor goes to the Triton kernels: on a GPU, or on the CPU under TRITON_INTERPRET=1."""
    return x.is_cuda or (x.device.type == "cpu" and launch.interpreting())


_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))


def watched(*tensors: Tensor | None) -> bool:
    """Whether somebody wants to see operators: a dispatch mode, or a tensor subclass."""
    return torch._C._len_torch_dispatch_stack() > 0 or not _PLAIN.issuperset(map(type, tensors))


@torch.compiler.assume_constant_result  # asked while dynamo traces; it guards the transforms itself
def transformed() -> bool:
    """Whether torch.func or forward-mode AD is at work."""
    return torch._C._functorch.get_dynamic_layer_stack_depth() > 0 or forward_ad._current_level >= 0
