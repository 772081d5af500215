"""``batch_norm``: F.batch_norm with a residual and an activation behind it."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_bn import autograd, masked, operators, reference
from triton_bn.problem import Activation, check, require_tensor
from triton_bn.recompute import owned_copy, recording
from triton_bn.route import route
from triton_bn.sync import Ranks

__all__ = ["batch_norm"]


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: str | Activation | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``activation(F.batch_norm(input, ...) + residual)``, fused.

    The formula is that of :class:`triton_bn.BatchNorm2d`: one mean, variance, weight and bias a channel.

    Args:
        input: (N, C, *), of float16, bfloat16, float32 or float64, in any memory format.
        running_mean, running_var: (C,). With ``training`` they are advanced in place (or both ``None``);
            without, they are what is normalized by.
        weight, bias: (C,), each or both ``None``.
        training: normalize by the statistics of this batch.
        momentum: the weight of this batch in the running statistics.
        eps: added to the variance.
        residual: added before the activation, as PyTorch's ``+`` would add it.
        activation: a name or an :class:`triton_bn.Activation`, which lists them.
        mask: (N, *), bool: which values take part. The others enter no statistic and get no gradient, whatever
            they hold, and the result is 0 there: see :class:`triton_bn.BatchNorm1d`.

    Returns:
        A tensor of the input's shape, dtype and memory format.

    Raises:
        ValueError, RuntimeError, NotImplementedError, IndexError: what F.batch_norm raises, in its
            words (:func:`triton_bn.problem.check`). Nothing has been changed then; but where PyTorch's own
            operators compute (:func:`triton_bn.route.route`), what they change before they raise.

    Example:
        >>> import torch, triton_bn
        >>> x, mean, var = torch.randn(8, 3, 5, 5), torch.zeros(3), torch.ones(3)
        >>> y = triton_bn.functional.batch_norm(x, mean, var, training=True, activation="relu")
        >>> y.shape
        torch.Size([8, 3, 5, 5])
        >>> bool(mean.any())  # the running statistics have advanced
        True
    """
    if momentum is None:
        raise TypeError("batch_norm(): argument 'momentum' must be float, not None")
    return _batch_norm(
        input, running_mean, running_var, None, weight, bias, training, momentum, eps,
        residual, Activation.of(activation), mask=mask,
    )  # fmt: skip


def _batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    activation: Activation | None,
    ranks: Ranks | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """:func:`batch_norm` for the layers: with their counter, and ``momentum=None`` for the cumulative average.

    With ``ranks``, input is this process's part of a training batch, and the caller is in ``ranks.together()``.
    """
    who = route(
        input, weight, bias, running_mean, running_var, residual, mask,
        batch_statistics=training, shared=ranks is not None,
    )  # fmt: skip
    if who == "torch" and mask is not None:
        momentum = None if momentum is None else _number("momentum", momentum)
        eps = _number("eps", eps)
        check(input, running_mean, running_var, weight, bias, training, eps)
        masked.check(mask, input, training)
        _fuses(input, residual)
        if input.numel() > 0:
            return masked.batch_norm(
                input, mask, weight, bias, residual, running_mean, running_var,
                num_batches_tracked, training, momentum, eps, activation,
            )  # fmt: skip
    if who == "torch":
        return _by_torch(
            input, running_mean, running_var, num_batches_tracked, weight, bias, training,
            momentum, eps, residual, activation,
        )  # fmt: skip
    momentum = None if momentum is None else _number("momentum", momentum)
    eps = _number("eps", eps)
    if ranks is None:
        check(input, running_mean, running_var, weight, bias, training, eps)
        fused = _fuses(input, residual)
    else:
        # How many values there are is a question to all ranks: here any part will do.
        part = input if input.numel() > input.shape[1] else input.new_empty((2, input.shape[1]))
        # FSDP's mixed precision casts parameters, not buffers: PyTorch's layer lets them differ.
        check(part, running_mean, running_var, None, None, training, eps)
        check(part, None, None, weight, bias, training, eps)
        if input.shape[1] != ranks.channels:
            raise RuntimeError(
                f"expected input with {ranks.channels} channels (num_features), got {input.shape[1]}"
            )
        fused = _fuses(input, residual)
    if mask is not None:
        masked.check(mask, input, training and ranks is None)
    separate = None
    if residual is not None and not fused:
        separate, residual = (residual, activation), None
        activation = None
    if input.numel() == 0 and ranks is None:
        y = _empty(input, weight, bias, residual, num_batches_tracked if training else None)
        y = reference.activate(y, activation)
    else:
        # A parameter may be a view with strides, one value expanded to all channels, say.
        if weight is not None:
            weight = weight.contiguous()
        if bias is not None:
            bias = bias.contiguous()
        if (
            training
            and num_batches_tracked is not None
            and num_batches_tracked.device != input.device
        ):
            num_batches_tracked.add_(1)
            if momentum is None and running_mean is not None:
                momentum = 1.0 / float(num_batches_tracked)
            num_batches_tracked = None
        # As may running statistics, which then advance in a copy.
        mean = None if running_mean is None else running_mean.contiguous()
        var = None if running_var is None else running_var.contiguous()
        computer = operators if who == "operators" else autograd
        y = computer.batch_norm(
            input, weight, bias, residual, mean, var,
            num_batches_tracked, training, momentum, eps, activation, ranks, mask,
        )  # fmt: skip
        if training:
            for given, dense in ((running_mean, mean), (running_var, var)):
                if given is not None and given is not dense:
                    given.copy_(dense)  # type: ignore[arg-type]
    if separate is not None and mask is not None:
        rest = reference.selected(mask, separate[0])
        y = reference.selected(mask, reference.activate(y + rest, separate[1]))
    elif separate is not None:
        y = reference.activate(y + separate[0], separate[1])
    return y


def _number(name: str, value: Any) -> float:
    """A float of what PyTorch takes for one: any real number, a NumPy scalar, a tensor without dimensions."""
    if type(value) is float:
        return value
    if torch.compiler.is_compiling():
        return float(value)  # dynamo knows a NumPy scalar's class otherwise than Python
    if isinstance(value, Real) or (
        isinstance(value, Tensor) and value.dim() == 0 and not value.requires_grad
    ):
        return float(value)
    kind = type(value).__name__
    raise TypeError(f"batch_norm(): argument '{name}' must be float, not {kind}")


def _by_torch(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    residual: Tensor | None,
    activation: Activation | None,
) -> Tensor:
    """:func:`_batch_norm` as ``torch.nn``'s layer with an addition and an activation behind it computes it."""
    if residual is not None and not torch.jit.is_tracing():  # type: ignore[attr-defined]
        _fuses(input, residual)  # sizes are tensors in a trace, where questions leave their mark
    factor = 0.0 if momentum is None else momentum
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
        if momentum is None and running_mean is not None and running_var is not None:
            if torch.compiler.is_compiling():
                # No value can be read there: PyTorch's layer ends in an error.
                mean, var = torch.zeros_like(running_mean), torch.ones_like(running_var)
                y = F.batch_norm(input, mean, var, weight, bias, True, 1.0, eps)
                average = num_batches_tracked.to(mean.dtype).reciprocal()
                running_mean.lerp_(mean, average)
                running_var.lerp_(var, average)
                return reference.activate(y if residual is None else y + residual, activation)
            factor = 1.0 / float(num_batches_tracked)
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, factor, eps)
    record = recording()
    if record is None or not y.requires_grad:
        return reference.activate(y if residual is None else y + residual, activation)
    statistics = (None, None) if training else (running_mean, running_var)
    owned = (*map(owned_copy, (*statistics, weight, bias)), training, eps)
    # Activations keep what they are given, what they return, or neither.
    record.remember(y, record.recipe(_again, input, None, owned=(*owned, None)))
    if residual is not None:
        y = y + residual
        record.remember(y, record.recipe(_again, input, residual, owned=(*owned, None)))
    if activation is not None:
        y = reference.activate(y, activation)
        record.remember(y, record.recipe(_again, input, residual, owned=(*owned, activation)))
    return y


def _again(
    input: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    eps: float,
    activation: Activation | None,
) -> Tensor:
    """The y of an earlier :func:`_by_torch`, bit for bit."""
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, 0.0, eps)
    return reference.activate(y if residual is None else y + residual, activation)


def _fuses(input: Tensor, residual: Tensor | None) -> bool:
    """Whether the residual can be added with the transform.

    What only PyTorch's ``+`` can do (broadcast, promote) is left to it, after the check that it can.
    """
    if residual is None:
        return True
    require_tensor("residual", residual)
    if residual.device != input.device:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but residual is on {residual.device}, "
            f"different from the input on {input.device}"
        )
    if residual.shape != input.shape:
        torch.broadcast_shapes(input.shape, residual.shape)
        return False
    return residual.dtype == input.dtype


def _empty(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    num_batches_tracked: Tensor | None,
) -> Tensor:
    """The result for an input without values: it has every gradient (zeros), and no statistics of its own."""
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    y = input.clone()
    for term in (weight, bias):
        if term is not None:
            y = y + term.sum().to(y.dtype) * 0
    return y if residual is None else y + residual
