"""Where a call goes (kernels or plain torch), and what its derivatives are."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from triton_bn import launch, reference
from triton_bn.plan import Device, heuristic
from triton_bn.problem import Activation, Problem, describe

__all__ = ["batch_norm", "use_kernels"]


def use_kernels(x: Tensor) -> bool:
    """Whether a tensor goes to the Triton kernels: on a GPU, or on the CPU under TRITON_INTERPRET=1."""
    return x.is_cuda or (x.device.type == "cpu" and launch.interpreting())


def _resolve(problem: Problem, x: Tensor) -> Any:
    return heuristic(problem, Device.current(x.device))


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    momentum: float | None,
    eps: float,
    activation: Activation | None,
    bits: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Training: y, stats (2, C) and, with bits, the packed slopes; running statistics advance in place."""
    if not use_kernels(x):
        return reference.forward(
            x, weight, bias, running_mean, running_var, num_batches_tracked, residual,
            momentum, eps, activation, bits,
        )  # fmt: skip
    cumulative = momentum is None and num_batches_tracked is not None and running_mean is not None
    problem, x = describe(
        x,
        training=True,
        residual=residual is not None,
        activation=activation,
        bits=bits,
        cumulative=cumulative,
    )
    return launch.forward(
        problem, _resolve(problem, x), x, weight, bias, running_mean, running_var,
        num_batches_tracked, residual, momentum, eps,
    )  # fmt: skip


def normalize(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    activation: Activation | None,
    bits: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The transform by a given mean and biased variance (C,): y, stats (2, C) and the packed slopes."""
    if not use_kernels(x):
        acc = reference.accumulator(x.dtype)
        stats = torch.stack([mean.reshape(-1).to(acc), (variance.reshape(-1).to(acc) + eps).rsqrt()])
        y, packed = reference.normalize(x, stats[0], stats[1], weight, bias, residual, activation, bits)
        return y, stats, packed
    problem, x = describe(
        x, training=False, residual=residual is not None, activation=activation, bits=bits
    )
    return launch.normalize(
        problem, _resolve(problem, x), x, mean, variance, weight, bias, residual, eps
    )


def backward(
    dy: Tensor,
    x: Tensor | None,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    activation: Activation | None,
    training: bool,
    needs: tuple[bool, bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias and dresidual, each where needed."""
    if use_kernels(dy):
        problem, seen = describe(
            dy if x is None else x,
            training=training,
            residual=residual is not None,
            activation=activation,
            bits=packed is not None,
        )
        problem = replace(problem, direction="backward")
        return launch.backward(
            problem, _resolve(problem, dy), dy, None if x is None else seen, stats, weight, bias,
            residual, packed, needs,
        )  # fmt: skip
    needs_x, needs_weight, needs_bias, needs_residual = needs
    arguments = (dy, x, stats, weight, bias, residual, packed, activation)
    dx = dweight = dbias = dresidual = sums = None
    if needs_weight or needs_bias or (needs_x and training):
        sums = reference.backward_reduce(*arguments)
        if needs_weight and weight is not None:
            dweight = (sums[1] * stats[1]).to(weight.dtype).reshape(weight.shape)
        if needs_bias and bias is not None:
            dbias = sums[0].to(bias.dtype).reshape(bias.shape)
    if needs_x or needs_residual:
        count = dy.numel() // dy.shape[1]
        dx, dresidual = reference.backward_apply(*arguments, sums if training else None, count)
    return dx if needs_x else None, dweight, dbias, dresidual if needs_residual else None


class _BatchNorm(torch.autograd.Function):
    """Normalization by batch statistics (``training``) or by running ones, with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
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
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        needs_sums = needs_weight or needs_bias or (needs_x and training)
        bits = (
            activation is not None
            and activation.two_slopes
            and any(ctx.needs_input_grad)
            and (residual is not None or not needs_sums)
        )
        if training:
            y, stats, packed = forward(
                x, weight, bias, running_mean, running_var, num_batches_tracked, residual,
                momentum, eps, activation, bits,
            )  # fmt: skip
        else:
            assert running_mean is not None and running_var is not None
            y, stats, packed = normalize(
                x, running_mean, running_var, weight, bias, residual, eps, activation, bits
            )
        recompute = activation is not None and not bits
        ctx.save_for_backward(
            x if needs_sums or recompute else None,
            stats,
            weight,
            bias,
            residual if recompute else None,
            packed,
        )
        ctx.training, ctx.activation = training, activation
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        gradients = backward(dy, *ctx.saved_tensors, ctx.activation, ctx.training, ctx.needs_input_grad[:4])
        return (*gradients, *[None] * 7)


batch_norm = _BatchNorm.apply
