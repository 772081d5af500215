"""Whether a provider computes what it is timed for: float64 against all results of what is timed.

The bounds are those of careful arithmetic, times :data:`SLACK`: a gate keeps out what is wrong, and
is no contest. With u and v the rounding errors of the input's dtype and of float32, M values a
channel and sums in blocks, the relative error is ``u + (log2(M) + 4) v`` of the terms added.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from perf.cases import Case

__all__ = ["Before", "judge"]

#: Roundings in a row (of bn, then of the sum with the residual), and sloppier sums than ours.
SLACK = 4.0

#: Values of x taken at a time, all of whose float64 copies must fit beside it.
CHUNK = 1 << 24


@dataclass(frozen=True)
class Before:
    """What a call is given. Vectors have a value a channel."""

    x: Tensor
    residual: Tensor | None
    dy: Tensor
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    momentum: float
    eps: float


def judge(case: Case, before: Before, results: Mapping[str, Tensor | None]) -> str:
    """What is wrong with the results, or "".

    They are y and in training dx, dweight, dbias, dresidual, running_mean and running_var.
    The slope of ReLU is taken where the provider's own y has it, which is judged first: the sign
    of a value near zero may differ by rounding alone. Such values are left out of dx and dresidual.
    """
    channels = case.shape[1]
    step = max(CHUNK * channels // before.x.numel(), 1)
    for first in range(0, channels, step):
        for name, value, bound in _expected(case, before, results, slice(first, first + step)):
            result = results.get(name)
            if result is None:
                return f"{name} is missing"
            shape = case.shape if value.dim() > 1 else (channels,)
            if result.shape != shape:
                return f"{name} has shape {tuple(result.shape)}, not {shape}"
            dim = 1 if value.dim() > 1 else 0
            part = result.detach().narrow(dim, first, min(step, channels - first)).double()
            ratio = (part - value).abs() / bound
            if not bool((ratio <= 1).all()):  # NaN is wrong
                wrong = f"{int((~(ratio <= 1)).sum())} of {value.numel()}"
                return f"{name}: {wrong} values off, by up to {ratio.max():.3g} bounds"
    return ""


def _expected(
    case: Case, before: Before, results: Mapping[str, Tensor | None], chosen: slice
) -> list[tuple[str, Tensor, Tensor]]:
    """Name, value in float64 and bound of each result, for some channels."""
    x = before.x.detach()[:, chosen].double()
    over = [d for d in range(x.dim()) if d != 1]
    count = x.numel() // x.shape[1]
    training = case.training
    stored = SLACK * torch.finfo(case.torch_dtype).eps / 2
    summed = SLACK * torch.finfo(torch.float32).eps / 2 * (math.log2(count) + 4)
    least = torch.finfo(case.torch_dtype).smallest_normal

    def wide(vector: Tensor) -> Tensor:
        return vector.detach()[chosen].double().view(1, -1, *[1] * (x.dim() - 2))

    def mean_of(values: Tensor) -> Tensor:
        return values.mean(over, keepdim=True)

    if training:
        mean = mean_of(x)
        variance = mean_of((x - mean).square())
    else:
        mean, variance = wide(before.running_mean), wide(before.running_var)
    invstd = (variance + before.eps).rsqrt()
    xhat = (x - mean) * invstd
    weight, bias = wide(before.weight), wide(before.bias)
    z = weight * xhat + bias
    terms = (weight * xhat).abs() + (weight * mean * invstd).abs() + bias.abs()
    if before.residual is not None:
        residual = before.residual.detach()[:, chosen].double()
        z, terms = z + residual, terms + z.abs() + residual.abs()
    e_z = (stored + summed) * terms + least
    relu = "relu" in case.op
    expected = [("y", z.clamp_min(0) if relu else z, e_z)]
    if not training:
        return expected

    def channel(name: str, value: Tensor, scale: Tensor) -> None:
        expected.append((name, value.flatten(), (summed * scale + least).flatten()))

    m = before.momentum
    old_mean, old_var = wide(before.running_mean), wide(before.running_var)
    spread = variance.sqrt() + mean.abs()
    channel("running_mean", (1 - m) * old_mean + m * mean, old_mean.abs() + m * spread)
    unbiased = variance * count / max(count - 1, 1)
    channel("running_var", (1 - m) * old_var + m * unbiased, old_var + m * unbiased)

    g = before.dy.detach()[:, chosen].double()
    own = results.get("y")
    certain = torch.ones_like(g, dtype=torch.bool)
    if relu and own is not None:
        g = g * (own.detach()[:, chosen] > 0)
        certain = z.abs() > e_z
    sum_g, sum_gx = mean_of(g), mean_of(g * xhat)
    size_g, size_gx = mean_of(g.abs()), mean_of((g * xhat).abs())
    channel("dweight", sum_gx * count, (size_gx + size_g) * count)
    channel("dbias", sum_g * count, size_g * count)
    dx = weight * invstd * (g - sum_g - xhat * sum_gx)
    e_dx = (weight * invstd).abs() * (g.abs() + size_g + xhat.abs() * size_gx)
    pairs = [("dx", dx, e_dx)]
    if before.residual is not None:
        pairs.append(("dresidual", g, g.abs()))
    for name, value, scale in pairs:
        bound = ((stored + summed) * scale + least).masked_fill(~certain, math.inf)
        expected.append((name, value, bound))
    return expected
