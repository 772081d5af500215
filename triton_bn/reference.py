"""The verbs in plain torch: the rule for derivatives of any order, and SyncBatchNorm's halves on a CPU.

Everything is computed in the accumulation dtype (float32, or float64 for float64 inputs) on tensors
of the input's own shape. With M values a channel, ``mean`` and ``invstd`` of shape (C,)::

    mean   = sum(x) / M                    m2 = sum((x - mean)**2)
    invstd = (m2 / M + eps) ** -1/2        z  = (x - mean) * invstd * weight + bias + residual
    y      = activation(z)

as in Ioffe and Szegedy, "Batch Normalization" (2015), algorithm 1, and backward, with
g = dy * activation'(z), for batch statistics (for running statistics dx is the first factor alone)::

    dbias = sum(g)    dweight = sum(g * (x - mean)) * invstd    dresidual = g
    dx = weight * invstd * (g - sum(g) / M - (x - mean) * invstd**2 * sum(g * (x - mean)) / M)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_bn.problem import Activation, canonical

aten = torch.ops.aten

__all__ = [
    "activate",
    "backward_apply",
    "backward_reduce",
    "differentiable_backward",
    "forward",
    "merge",
    "moments",
    "normalize",
    "row",
    "selected",
    "taking",
    "update_running",
]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums over values of ``dtype`` are taken, and statistics are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# name: (activation(z), its derivative times g), with the parameter p; the derivatives as autograd takes them.
_ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "relu": (lambda z, p: F.relu(z), lambda g, z, p: aten.threshold_backward(g, z, 0)),
    "relu6": (lambda z, p: F.relu6(z), lambda g, z, p: aten.hardtanh_backward(g, z, 0, 6)),
    "leaky_relu": (F.leaky_relu, lambda g, z, p: aten.leaky_relu_backward(g, z, p, False)),
    "silu": (lambda z, p: F.silu(z), lambda g, z, p: aten.silu_backward(g, z)),
    "hardswish": (lambda z, p: F.hardswish(z), lambda g, z, p: aten.hardswish_backward(g, z)),
    "gelu": (lambda z, p: F.gelu(z), lambda g, z, p: aten.gelu_backward(g, z)),
    "elu": (F.elu, lambda g, z, p: aten.elu_backward(g, p, 1, 1, False, z)),
    "mish": (lambda z, p: F.mish(z), lambda g, z, p: aten.mish_backward(g, z)),
    "sigmoid": (lambda z, p: z.sigmoid(), lambda g, z, p: aten.sigmoid_backward(g, z.sigmoid())),
    "tanh": (lambda z, p: z.tanh(), lambda g, z, p: aten.tanh_backward(g, z.tanh())),
}


def activate(z: Tensor, activation: Activation | None) -> Tensor:
    """``activation(z)``: the function of ``torch.nn.functional`` or ``torch``."""
    if activation is None:
        return z
    return _ACTIVATIONS[activation.name][0](z, activation.parameter)


def _activated(z: Tensor, activation: Activation | None) -> Tensor:
    """:func:`activate`, but for F.gelu, whose float32 is up to 5 roundings of z off where a CPU takes it in vectors."""
    if activation is not None and activation.name == "gelu":
        return z * torch.special.ndtr(z)
    return activate(z, activation)


def gradient(g: Tensor, z: Tensor, activation: Activation) -> Tensor:
    """``g * activation'(z)``."""
    return _ACTIVATIONS[activation.name][1](g, z, activation.parameter)


def _channelwise(v: Tensor, x: Tensor) -> Tensor:
    """(C,) → (1, C, 1, ...) of the accumulation dtype, to stand beside x."""
    return v.to(accumulator(x.dtype)).reshape(-1, *[1] * (x.dim() - 2))


def _reduced(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of each channel: two tensors (C,) of the accumulation dtype."""
    base, mean, rest, m2 = _moments(x)
    return base + mean + rest, m2


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The mean in three parts, that their sum would round, and the sum of squared deviations from it."""
    x = x.to(accumulator(x.dtype))
    # Relative to a channel's first value, then to the mean found there: sums of many values far from
    # zero would be some roundings off, and constant channels would not come out as they are.
    base = x[(slice(1), slice(None), *[slice(1)] * (x.dim() - 2))]
    x = x - base
    mean = x.mean(_reduced(x))
    x = x - _channelwise(mean, x)
    rest = x.mean(_reduced(x))
    m2 = (x - _channelwise(rest, x)).square().sum(_reduced(x))
    return base.reshape(-1), mean, rest, m2


def selected(mask: Tensor, values: Tensor) -> Tensor:
    """``values`` (N, C, *), and 0 where the mask (N, *) leaves them out."""
    return torch.where(mask.unsqueeze(1), values, 0)


class Taking(NamedTuple):
    """Moments of what takes part: the mean in the three parts of :func:`_moments`, and the deviations from it."""

    base: Tensor
    mean: Tensor
    rest: Tensor
    m2: Tensor
    values: Tensor
    centered: Tensor


def taking(x: Tensor, mask: Tensor) -> Taking:
    """The moments of what takes part by a mask (N, *): what is left out is replaced before any arithmetic.

    The count is a tensor, for which nothing has waited; without a value the moments are 0.
    """
    acc, takes = accumulator(x.dtype), mask.unsqueeze(1)
    base = _first(x, mask).to(acc)
    base = torch.where(base.isfinite(), base, 0)
    count = mask.sum().to(acc)
    k = count.clamp_min(1)
    d = torch.where(takes, x.to(acc), _channelwise(base, x)) - _channelwise(base, x)
    mean = d.sum(_reduced(x)) / k
    d = torch.where(takes, d - _channelwise(mean, x), 0)
    rest = d.sum(_reduced(x)) / k
    d = torch.where(takes, d - _channelwise(rest, x), 0)
    return Taking(base, mean, rest, d.square().sum(_reduced(x)), count, d)


def _first(x: Tensor, mask: Tensor) -> Tensor:
    """(C,): of each channel the first value that takes part; some value where none does. A constant of x."""
    place = mask.reshape(-1).int().argmax().view(1)
    index: list[Tensor | slice] = []
    for size in reversed(mask.shape):
        index.insert(0, place % size)
        place = place // size
    index.insert(1, slice(None))
    return x.detach()[tuple(index)].reshape(-1)


def row(x: Tensor, tag: int, mask: Tensor | None = None) -> Tensor:
    """The row (:mod:`triton_bn.sync`) of x, (2 * C + 2,) of float64: mean, M2, count and tag."""
    if mask is not None:
        base, mean, rest, m2, count, _ = (t.double() for t in taking(x, mask))
        ends = torch.stack([count, count.new_tensor(tag)])
        return torch.cat([base + mean + rest, m2, ends])
    base, mean, rest, m2 = (t.double() for t in _moments(x))
    return torch.cat([base + mean + rest, m2, m2.new_tensor([x.numel() // x.shape[1], tag])])


def merge(
    rows: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> Tensor:
    """The rows of all ranks, (ranks, 2 * C + 2), merged by Chan's rule; running statistics advance.

    Returns:
        Mean, biased variance and the count of all (3, C), in float64.
    """
    channels = rows.shape[1] // 2 - 1
    mean, m2, counts = rows[:, :channels], rows[:, channels:-2], rows[:, -2:-1]
    count = counts.sum()
    centre = (counts * mean).sum(0) / count.clamp_min(1)
    m2 = (m2 + counts * (mean - centre).square()).sum(0)
    update_running(centre, m2, count, running_mean, running_var, num_batches_tracked, momentum)
    return torch.stack([centre, m2 / count.clamp_min(1), count.expand_as(m2)])


def inverse_std(variance: Tensor, eps: float) -> Tensor:
    """1 / sqrt(variance + eps). Where that sum is 0 in the tensor's dtype, 1 / sqrt(eps): there all values are
    equal, and 0 * inf would be NaN."""
    v = variance + eps
    root = min(eps**-0.5, torch.finfo(v.dtype).max) if eps > 0 else math.inf
    return torch.where(
        v == 0, root, torch.where(v == 0, 1, v).rsqrt()
    )  # whose slope at 0 is infinite


def update_running(
    mean: Tensor,
    m2: Tensor,
    count: int | Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> None:
    """Advances the running statistics in place by a batch of ``count`` values a channel.

    A tensor's count may be 0, which leaves both as they are, or 1, which has no unbiased variance.

    ``running = (1 - f) * running + f * batch`` with the unbiased variance, where ``f`` is the momentum
    or, for ``momentum=None``, 1 / num_batches_tracked, taken where that counter lives.
    """
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    if running_mean is None or running_var is None:
        return
    factor: float | Tensor
    if momentum is not None:
        factor = momentum
    elif num_batches_tracked is not None:
        factor = 1.0 / num_batches_tracked.to(mean.device, mean.dtype)
    else:
        factor = 0.0
    for least, running, batch in ((1, running_mean, mean), (2, running_var, m2 / (count - 1))):
        old = running.to(mean.dtype)
        new = (1 - factor) * old + factor * batch.reshape(old.shape)
        running.copy_(new if isinstance(count, int) else torch.where(count >= least, new, old))


def _preactivation(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """z of the module's docstring, in the accumulation dtype."""
    scale = invstd if weight is None else invstd * weight.reshape(-1).to(invstd.dtype)
    z = (x.to(invstd.dtype) - _channelwise(mean, x)) * _channelwise(scale, x)
    if bias is not None:
        z = z + _channelwise(bias, x)
    if residual is not None:
        z = z + residual.to(z.dtype)
    return z


def normalize(
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: Activation | None,
    bits: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The transform: ``y`` like x, and with ``bits`` the packed slopes (:func:`pack`), else ``None``."""
    if mask is not None:
        left, residual = (None if t is None else selected(mask, t) for t in (x, residual))
        assert left is not None
        y, packed = normalize(left, mean, invstd, weight, bias, residual, activation, bits)
        return torch.empty_like(x).copy_(selected(mask, y)), packed
    z = _preactivation(x, mean, invstd, weight, bias, residual)
    packed = None
    if bits and activation is not None:
        rounded = z.to(x.dtype).to(z.dtype)  # all that PyTorch's activation would see
        packed = pack(gradient(torch.ones_like(z), rounded, activation) == 1, x)
    return _activated(z, activation).to(x.dtype), packed


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
    bits: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Training: moments, running statistics and transform. Returns ``y``, ``stats`` and the packed slopes.

    ``stats`` is (2, C) of the accumulation dtype: mean and invstd, which backward needs, with a mask (3, C): the
    count, too.
    """
    count: int | Tensor
    if mask is None:
        mean, m2 = moments(x)
        count = x.numel() // x.shape[1]
        stats = torch.stack([mean, inverse_std(m2 / count, eps)])
    else:
        base, mean, rest, m2, count, _ = taking(x, mask)
        mean = base + mean + rest
        invstd = inverse_std(m2 / count.clamp_min(1), eps)
        stats = torch.stack([mean, invstd, count.expand_as(mean)])
    update_running(mean, m2, count, running_mean, running_var, num_batches_tracked, momentum)
    y, packed = normalize(x, stats[0], stats[1], weight, bias, residual, activation, bits, mask)
    return y, stats, packed


def _gradient(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    activation: Activation | None,
) -> Tensor:
    """g of the module's docstring, in the accumulation dtype."""
    g = dy.to(stats.dtype)
    if activation is None:
        return g
    if packed is not None and packed.dtype != torch.uint8:  # y, which tells the slope
        return gradient(g, packed.detach().to(g.dtype), activation)
    if packed is not None:
        low = torch.zeros_like(g) if activation.parameter is None else g * activation.parameter
        return torch.where(unpack(packed, x), g, low)
    return gradient(g, _preactivation(x, stats[0], stats[1], weight, bias, residual), activation)


def backward_reduce(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    activation: Activation | None,
) -> Tensor:
    """(2, C) of the accumulation dtype: sum(g) and sum(g * (x - mean)) of each channel."""
    g = _gradient(dy, x, stats, weight, bias, residual, packed, activation)
    centered = x.to(g.dtype) - _channelwise(stats[0], x)
    return torch.stack([g.sum(_reduced(x)), (g * centered).sum(_reduced(x))])


def backward_apply(
    dy: Tensor,
    x: Tensor | None,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    activation: Activation | None,
    sums: Tensor | None,
    count: int | Tensor,
) -> tuple[Tensor, Tensor]:
    """dx and dresidual, like dy. ``sums`` of :func:`backward_reduce` over ``count`` values a channel;
    ``None`` for running statistics, whose dx is the first factor alone (and needs no x without an
    activation to take the slope of, or with its packed slopes)."""
    like = dy if x is None else x
    g = _gradient(dy, like, stats, weight, bias, residual, packed, activation)
    dresidual = torch.empty_like(like).copy_(g)
    scale = stats[1] if weight is None else stats[1] * weight.reshape(-1).to(stats.dtype)
    if sums is not None:
        assert x is not None
        centered = x.to(g.dtype) - _channelwise(stats[0], x)
        projection = stats[1].square() * sums[1] / count
        g = g - _channelwise(sums[0] / count, x) - centered * _channelwise(projection, x)
    # Copied, not cast: dx keeps the memory format of x whatever that of dy.
    return torch.empty_like(like).copy_(g * _channelwise(scale, like)), dresidual


def differentiable_backward(
    dy: Tensor,
    x: Tensor | None,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    activation: Activation | None,
    training: bool,
    eps: float,
    needs: tuple[bool, bool, bool, bool],
    create_graph: bool = True,
    mask: Tensor | None = None,
) -> tuple[Tensor | None, ...]:
    """dx, dweight, dbias and dresidual in operators that have derivatives themselves.

    The forward is taken once more and differentiated, with respect to aliases of the tensors, so that
    one tensor in two places (x and residual, say) gets the gradient of each place.
    """
    if mask is not None:
        dy = selected(mask, dy)
    if x is None:  # linear in dy: running statistics, and no slope or one that was kept
        dx, dresidual = backward_apply(
            dy, x, stats, weight, bias, residual, packed, activation, None, 1
        )
        return dx if needs[0] else None, None, None, dresidual if needs[3] else None
    places = [None if t is None else t.view_as(t) for t in (x, weight, bias, residual)]
    x, weight, bias, residual = places
    assert x is not None
    mean, invstd = stats[0], stats[1]
    if training and mask is not None:
        base, mean, rest, m2, count, _ = taking(x, mask)
        mean, invstd = base + mean + rest, inverse_std(m2 / count.clamp_min(1), eps)
    elif training:
        mean, m2 = moments(x)
        invstd = (m2 / (x.numel() // x.shape[1]) + eps).rsqrt()
    if mask is not None:
        x, residual = (None if t is None else selected(mask, t) for t in (x, residual))
        assert x is not None
    g = dy.to(stats.dtype)
    if packed is not None:
        g = _gradient(dy, x, stats, None, None, None, packed, activation)
        activation = None
    y = _activated(_preactivation(x, mean, invstd, weight, bias, residual), activation)
    wanted = [t for t, needed in zip(places, needs, strict=True) if needed and t is not None]
    found = iter(torch.autograd.grad(y, wanted, g, create_graph=create_graph) if wanted else ())
    gradients = [
        next(found) if needed and t is not None else None
        for t, needed in zip(places, needs, strict=True)
    ]
    if needs[2] and bias is None:  # nor is it where y depends on it by its addition alone
        gradients[2] = g.sum(_reduced(x))
    if needs[3] and residual is None:  # its place is behind y: the slopes are kept instead of it
        gradients[3] = g.to(dy.dtype)
    return tuple(gradients)


def block(x: Tensor) -> tuple[tuple[int, int, int], list[int]]:
    """Canonical sizes of ``torch.empty_like(x)``, and the order of its dimensions in memory."""
    layout = torch.empty_like(x, device="meta")
    view = canonical(tuple(layout.shape), layout.stride())
    assert view is not None, "a dense tensor always has its canonical view"
    return view[0], sorted(range(x.dim()), key=lambda d: (-layout.stride()[d], d))


def in_layout(t: Tensor, strides: tuple[int, ...]) -> Tensor:
    """``t`` with its dimensions in the memory order of ``strides``, in operators that have every rule."""
    order = sorted(range(t.dim()), key=lambda d: -strides[d])
    return t.permute(order).contiguous().permute([order.index(d) for d in range(t.dim())])


def pack(bit: Tensor, x: Tensor) -> Tensor:
    """One bit a value, of x's shape, as bytes [outer, ceil(channels * inner / 8)], lowest bit first.

    The bits of a row of the canonical block (:mod:`triton_bn.problem`) follow one another as its values
    do in memory, so that kernels read and write them beside the values.
    """
    (outer, channels, inner), order = block(x)
    rows = bit.permute(order).reshape(outer, channels * inner).to(torch.uint8)
    rows = F.pad(rows, (0, -rows.shape[1] % 8)).reshape(outer, -1, 8)
    weights = torch.tensor([1 << i for i in range(8)], dtype=torch.uint8, device=bit.device)
    return (rows * weights).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor, x: Tensor) -> Tensor:
    """The inverse of :func:`pack`: booleans of x's shape."""
    (_, channels, inner), order = block(x)
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    rows = (packed.unsqueeze(-1) >> shifts & 1).flatten(1)[:, : channels * inner]
    permuted = rows.reshape([x.shape[d] for d in order])
    return permuted.permute([order.index(d) for d in range(x.dim())]).bool()
