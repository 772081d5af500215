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

__all__ = ["batch_norm", "check", "selected"]


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


def selected(mask: Tensor, values: Tensor) -> Tensor:
    """``values`` (N, C, *), and 0 where the mask (N, *) leaves them out."""
    return torch.where(mask.unsqueeze(1), values, 0)


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
    takes = mask.unsqueeze(1)
    if training:
        base = _first(x, mask).to(acc)
        base = torch.where(base.isfinite(), base, 0)
        d = torch.where(takes, x.to(acc), _beside(base, x)) - _beside(base, x)
        count = mask.sum().to(acc)
        k = count.clamp_min(1)
        mean = _sum(d) / k
        d = torch.where(takes, d - _beside(mean, x), 0)
        rest = _sum(d) / k
        d = torch.where(takes, d - _beside(rest, x), 0)
        m2 = _sum(d.square())
        with torch.no_grad():
            reference.update_running(
                base + mean + rest, m2, count, running_mean, running_var, num_batches_tracked, momentum
            )  # fmt: skip
        invstd = reference.inverse_std(m2 / k, eps)
    else:
        assert running_mean is not None and running_var is not None
        mean = running_mean.reshape(-1).to(acc)
        d = torch.where(takes, x.to(acc) - _beside(mean, x), 0)
        invstd = reference.inverse_std(running_var.reshape(-1).to(acc), eps)
    z = d * _beside(invstd if weight is None else invstd * weight.reshape(-1).to(acc), x)
    if bias is not None:
        z = z + _beside(bias.reshape(-1).to(acc), x)
    if residual is not None:
        residual = selected(mask, residual)
        if residual.shape != x.shape or residual.dtype != x.dtype:  # broadcast, promoted
            z = selected(mask, reference.activate(z.to(x.dtype) + residual, activation))
            return z
        z = z + residual
    y = selected(mask, reference.activate(z, activation)).to(x.dtype)
    if torch.compiler.is_compiling() or y.stride() == x.stride():
        return y
    return reference.in_layout(y, x.stride())


def _beside(v: Tensor, x: Tensor) -> Tensor:
    """(C,) → (C, 1, ...), to stand beside x."""
    return v.reshape(-1, *[1] * (x.dim() - 2))


def _sum(x: Tensor) -> Tensor:
    return x.sum([d for d in range(x.dim()) if d != 1])


def _first(x: Tensor, mask: Tensor) -> Tensor:
    """(C,): of each channel the first value that takes part; some value where none does. A constant of x."""
    place = mask.reshape(-1).int().argmax().view(1)
    index: list[Tensor | slice] = []
    for size in reversed(mask.shape):
        index.insert(0, place % size)
        place = place // size
    index.insert(1, slice(None))
    return x.detach()[tuple(index)].reshape(-1)
