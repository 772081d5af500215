"""What the derivative of a normalization is: the autograd function, over verbs called directly or as operators."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from triton_bn import reference, verbs
from triton_bn.problem import Activation
from triton_bn.recompute import owned_copy, recording
from triton_bn.route import transformed
from triton_bn.sync import Ranks
from triton_bn.verbs import Gradients

__all__ = ["BatchNorm", "Call", "Direct", "Operators", "batch_norm", "flat", "keeps_bits"]


def batch_norm(
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
    ranks: Ranks | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """``activation(bn(x) + residual)`` for checked arguments, a residual like x, and at least one value.

    With ``ranks``, in training, x is this process's part of the batch; a part may have no values.
    """
    differentiable = torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
        or (residual is not None and residual.requires_grad)
    )
    if not differentiable:
        # Nobody will ask for a gradient: no node, which would cost as much as the rest.
        if training:
            return verbs.forward(
                x, weight, bias, running_mean, running_var, num_batches_tracked, residual,
                momentum, eps, activation, False, ranks, mask,
            )[0]  # fmt: skip
        assert running_mean is not None and running_var is not None, "check() has asked"
        return verbs.normalize(
            x, running_mean, running_var, weight, bias, residual, eps, activation, False, mask
        )[0]
    bits = keeps_bits(x, weight, bias, residual, training, activation)
    call = Call(Direct, training, momentum, eps, activation, bits, ranks)
    y = BatchNorm.apply(
        call, x, weight, bias, residual, running_mean, running_var, num_batches_tracked, mask
    )
    record = recording()
    if record is not None and y.requires_grad:
        owned = (y.grad_fn.stats, owned_copy(weight), owned_copy(bias), activation)
        record.remember(y, record.recipe(verbs.again, x, residual, mask, owned=owned))
    return y


class Call(NamedTuple):
    """What is no tensor of a call: one argument of :class:`BatchNorm`, since each costs time.

    ``verbs`` are what computes: :class:`Direct` or the operators that stand for them.
    """

    verbs: Any
    training: bool
    momentum: float | None
    eps: float
    activation: Activation | None
    bits: bool
    ranks: Any = None


class BatchNorm(torch.autograd.Function):
    """Normalization by batch statistics (``training``) or by running ones, with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        call: Call,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        mask: Tensor | None = None,
    ) -> Any:
        verbs, training, momentum, eps, activation, bits, ranks = call
        if training:
            y, stats, packed = verbs.forward(
                x, weight, bias, running_mean, running_var, num_batches_tracked, residual,
                momentum, eps, activation, bits, ranks, mask,
            )  # fmt: skip
        else:
            y, stats, packed = verbs.normalize(
                x, running_mean, running_var, weight, bias, residual, eps, activation, bits, mask
            )
        needs_sums = _needs_sums(ctx.needs_input_grad[1:4], training)
        keep_y = not bits and _keeps_slopes(activation, residual, needs_sums)
        recompute = activation is not None and not bits and not keep_y
        keep_x = recompute or needs_sums
        ctx.save_for_backward(
            x if keep_x else None, stats, weight, bias if recompute else None,
            residual if recompute else None, packed if bits else y if keep_y else None, mask,
        )  # fmt: skip
        ctx.bias_shape = None if bias is None else bias.shape
        ctx.verbs, ctx.training, ctx.eps, ctx.activation = verbs, training, eps, activation
        ctx.layout, ctx.ranks, ctx.stats = y.stride(), ranks, stats
        if verbs.all_outputs:
            ctx.mark_non_differentiable(stats, packed)
            return y, stats, packed
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, stats, weight, bias, residual, packed, mask = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:5]
        again = torch.is_grad_enabled()
        # Compiled autograd traces what eager calls have saved.
        verbs = Operators if torch.compiler.is_compiling() else ctx.verbs
        if x is None and dy.stride() != ctx.layout:
            dy = reference.in_layout(dy, ctx.layout)
        if (again or transformed() or _batched(dy)) and ctx.ranks is None:
            # create_graph, gradients batched by vmap, or dy with a tangent: the gradient as a function of
            # everything, in operators that have rules for all of that.
            with torch.enable_grad():
                gradients = reference.differentiable_backward(
                    dy, x, stats, weight, bias, residual, packed, ctx.activation, ctx.training,
                    ctx.eps, needs, again, mask,
                )  # fmt: skip
        else:
            with torch.no_grad() if again else nullcontext():
                gradients = verbs.backward(
                    dy, x, stats, weight, bias, residual, packed, ctx.activation, ctx.training,
                    needs, ctx.ranks, mask,
                )  # fmt: skip
            if again:
                gradients = _only_once(gradients)
        dx, dweight, dbias, dresidual = gradients
        if dbias is not None and dbias.shape != ctx.bias_shape:
            dbias = dbias.view(ctx.bias_shape)
        # dbias may have another dtype than the bias: autograd casts it.
        return None, dx, dweight, dbias, dresidual, None, None, None, None


def _batched(dy: Tensor) -> bool:
    """Whether many gradients come at once: ``torch.autograd.grad(..., is_grads_batched=True)``."""
    if torch.compiler.is_compiling():
        return False
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(dy) or functorch.is_legacy_batchedtensor(dy)


class Direct:
    """The functions of :mod:`triton_bn.verbs`, called directly: the eager way."""

    all_outputs = False
    forward = staticmethod(verbs.forward)
    normalize = staticmethod(verbs.normalize)
    backward = staticmethod(verbs.backward)


class Operators:
    """The same as registered operators; ``keys`` are those below autograd, while it runs."""

    all_outputs = True

    def __init__(self, keys: Any) -> None:
        self.keys = keys

    def forward(self, *arguments: Any) -> Any:
        *tensors, activation, bits, ranks, mask = arguments
        op = torch.ops.triton_bn.forward.default
        return op.redispatch(
            self.keys, *tensors, *flat(activation), bits, *(ranks or (None, False)), mask
        )

    def normalize(self, *arguments: Any) -> Any:
        *tensors, activation, bits, mask = arguments
        op = torch.ops.triton_bn.normalize.default
        return op.redispatch(self.keys, *tensors, *flat(activation), bits, mask)

    @staticmethod
    def backward(*arguments: Any) -> Gradients:
        *tensors, activation, training, needs, ranks, mask = arguments
        group = None if ranks is None else ranks[0]
        gradients = torch.ops.triton_bn.backward(
            *tensors, *flat(activation), training, needs, group, mask
        )
        dx, dweight, dbias, dresidual = (
            g if needed else None for g, needed in zip(gradients, needs, strict=True)
        )
        return dx, dweight, dbias, dresidual


def _only_once(gradients: Gradients) -> Gradients:
    """The gradients, which raise where they are differentiated: nobody made those of a shared batch so."""
    present = [g for g in gradients if g is not None]
    error = torch._C._functions.DelayedError(
        "SyncBatchNorm has no second derivatives, as PyTorch's has none", len(present)
    )
    marked = iter(error(*(g.detach().requires_grad_() for g in present)))
    dx, dweight, dbias, dresidual = (None if g is None else next(marked) for g in gradients)
    return dx, dweight, dbias, dresidual


def _needs_sums(needs: tuple[bool, bool, bool], training: bool) -> bool:
    """Whether the gradients of (x, weight, bias) that are needed take sums over channels, so x."""
    return needs[1] or needs[2] or (needs[0] and training)


def _keeps_slopes(activation: Activation | None, residual: Tensor | None, needs_sums: bool) -> bool:
    """Whether backward is given the activation's slopes, instead of computing what it was given again."""
    two_slopes = activation is not None and activation.two_slopes
    return two_slopes and (residual is not None or not needs_sums)


def keeps_bits(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    training: bool,
    activation: Activation | None,
) -> bool:
    """Whether the forward packs the activation's slopes for the backward.

    Where the output tells them that is kept, as PyTorch's ReLU does and the next layer anyway; or made again,
    inside :func:`triton_bn.recompute`, so that backward runs by the same plan there, to the same bits.
    """
    if activation is None or not torch.is_grad_enabled():
        return False
    needs = [t is not None and t.requires_grad for t in (x, weight, bias, residual)]
    needs_sums = _needs_sums((needs[0], needs[1], needs[2]), training)
    if not any(needs) or not _keeps_slopes(activation, residual, needs_sums):
        return False
    return not activation.output_tells


def flat(activation: Activation | None) -> tuple[str | None, float | None]:
    return (None, None) if activation is None else (activation.name, activation.parameter)
