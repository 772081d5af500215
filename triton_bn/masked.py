"""Batch normalization of a part of the values, in PyTorch's operators: as over the values gathered.

With k values a channel that take part, ``mean`` and ``var`` are those of these k, and the running variance takes
``var * k / (k - 1)``. What is left out is replaced before any arithmetic, so that whatever is there, NaN and
infinities included, reaches no statistic and no gradient. Nothing asks the GPU how many there are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from triton_bn import reference
from triton_bn.problem import Activation, require_tensor
from triton_bn.route import readable

__all__ = ["batch_norm", "check", "laid_out"]


def check(mask: Tensor, input: Tensor, training: bool) -> None:
    """Raises where a mask does not fit an input (N, C, *). Nothing has been written when it raises.

    Raises:
        TypeError: for what is no tensor.
        RuntimeError: where it is not bool, not (N, *), or on another device.
        ValueError: in training, where one value takes part, so far as that can be seen without waiting for a GPU.
    """
    require_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise RuntimeError(f"expected mask to have dtype torch.bool, but got {mask.dtype}")
    wanted = (*input.shape[:1], *input.shape[2:])
    if tuple(mask.shape) != wanted:
        raise RuntimeError(
            f"expected mask to have the shape {list(wanted)} of the input without its channels, "
            f"but got {list(mask.shape)}"
        )
    if mask.device != input.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but mask is on {mask.device}, "
            f"different from the input on {input.device}"
        )
    if training and readable(mask) and int(mask.sum()) == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got 1 that takes part by the mask"
        )


def laid_out(mask: Tensor | None, x: Tensor, counted: bool) -> tuple[Tensor | None, Tensor | None]:
    """The mask for the kernels: in the canonical block of x, and where ``counted`` how many values of a channel take
    part and the first place that does, which nobody waits for (:data:`triton_bn.launch.Taking`)."""
    if mask is None:
        return None, None
    (outer, _, inner), order = reference.block(x)
    rest = mask.permute([d - (d > 1) for d in order if d != 1])
    block = rest.reshape(outer, inner).contiguous().view(torch.uint8)
    if not counted:
        return block, None
    return block, torch.stack([block.sum(dtype=torch.int64), block.view(-1).argmax()])


def batch_norm(
    x: Tensor,
    mask: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    activation: Activation | None,
) -> Tensor:
    """``activation(bn(x) + residual)`` for checked arguments, and at least one value.

    Sums are taken, and all but the result is held, in the accumulation dtype. It has derivatives of any order, and
    all the rules that PyTorch's operators have. The residual is added as ``+`` adds it.
    """
    acc = reference.accumulator(x.dtype)
    if training:
        base, mean, rest, m2, count, d = reference.taking(x, mask)
        with torch.no_grad():
            reference.update_running(
                base + mean + rest, m2, count, running_mean, running_var, num_batches_tracked, momentum
            )  # fmt: skip
        invstd = reference.inverse_std(m2 / count.clamp_min(1), eps)
    else:
        assert running_mean is not None and running_var is not None
        mean = running_mean.reshape(-1).to(acc)
        d = reference.selected(mask, x.to(acc) - _beside(mean, x))
        invstd = reference.inverse_std(running_var.reshape(-1).to(acc), eps)
    z = d * _beside(invstd if weight is None else invstd * weight.reshape(-1).to(acc), x)
    if bias is not None:
        z = z + _beside(bias.reshape(-1).to(acc), x)
    if residual is not None:
        residual = reference.selected(mask, residual)
        if residual.shape != x.shape or residual.dtype != x.dtype:  # broadcast, promoted
            z = reference.selected(mask, reference.activate(z.to(x.dtype) + residual, activation))
            return z
        z = z + residual
    y = reference.selected(mask, reference.activate(z, activation)).to(x.dtype)
    if torch.compiler.is_compiling() or y.stride() == x.stride():
        return y
    return reference.in_layout(y, x.stride())


def _beside(v: Tensor, x: Tensor) -> Tensor:
    """(C,) → (C, 1, ...), to stand beside x."""
    return v.reshape(-1, *[1] * (x.dim() - 2))
