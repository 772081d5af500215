"""What batch normalization is in float64, and how far float arithmetic may stray from it.

:func:`batch_norm` gives every result with a bound of its own for each value: what a careful
algorithm may lose. Careful means that each sum over M values costs at most ``log2(M) + 4``
roundings (sums in blocks or pairs, not one after another), that the variance is taken about the
mean, and that x is centred before it is scaled. The bounds know the storage dtype, the accumulation
dtype, M, and the data; nothing is tuned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from triton_bn.problem import Activation

__all__ = ["ACTIVATIONS", "Bounded", "activate", "batch_norm", "observe", "rounding", "slope"]

#: Every activation as torch.nn.functional has it, of (z, parameter).
ACTIVATIONS: dict[str, Callable[[Tensor, float | None], Tensor]] = {
    "relu": lambda z, _: F.relu(z),
    "relu6": lambda z, _: F.relu6(z),
    "leaky_relu": lambda z, slope: F.leaky_relu(z, 0.01 if slope is None else slope),
    "silu": lambda z, _: F.silu(z),
    "hardswish": lambda z, _: F.hardswish(z),
    "gelu": lambda z, _: F.gelu(z),
    "elu": lambda z, alpha: F.elu(z, 1.0 if alpha is None else alpha),
    "mish": lambda z, _: F.mish(z),
    "sigmoid": lambda z, _: torch.sigmoid(z),
    "tanh": lambda z, _: torch.tanh(z),
}

#: Those whose value and slope take no function but a multiplication.
PIECEWISE_LINEAR = ("relu", "relu6", "leaky_relu")


def activate(z: Tensor, activation: Activation | None) -> Tensor:
    if activation is None:
        return z
    return ACTIVATIONS[activation.name](z, activation.parameter)


def slope(z: Tensor, activation: Activation | None) -> Tensor:
    """The derivative of the activation as PyTorch's autograd takes it."""
    if activation is None:
        return torch.ones_like(z)
    leaf = z.detach().clone().requires_grad_()
    return torch.autograd.grad(activate(leaf, activation).sum(), leaf)[0]


@dataclass(frozen=True)
class Bounded:
    """A result in float64 and the largest error allowed at each of its values."""

    value: Tensor
    bound: Tensor

    def ratio(self, actual: Tensor | None) -> float:
        """The worst error as a multiple of what is allowed there: above 1 is wrong.

        Infinity stands for NaN and for a result that is missing or of another shape.
        """
        if actual is None or actual.shape != self.value.shape:
            return math.inf
        error = (actual.detach().to(self.value) - self.value).abs()
        worst = (error / self.bound.clamp_min(1e-300)).max().item() if error.numel() else 0.0
        return math.inf if math.isnan(worst) else worst

    def assert_close(self, actual: Tensor | None, what: str, *, rms: bool = True) -> None:
        """Fails where a value is further off than its bound, or all by 0.6 of it in the root mean
        square: rounding to nearest makes 0.42. The latter needs many values with errors of their
        own: ``rms=False`` for repeated ones."""
        assert actual is not None, f"{what} is missing"
        assert actual.shape == self.value.shape, f"{what}: {actual.shape} for {self.value.shape}"
        error = (actual.detach().to(self.value) - self.value).abs()
        ratio = error / self.bound
        wrong = ~(ratio <= 1)  # NaN is wrong
        if wrong.any():
            index = tuple(int(i) for i in wrong.nonzero()[0])
            raise AssertionError(
                f"{what}: {int(wrong.sum())} of {wrong.numel()} values out of bound, at worst "
                f"{ratio.max().item():.3g} times; first at {index}: {actual[index].item()} for "
                f"{self.value[index].item()}, error {error[index].item():.3g}, "
                f"bound {self.bound[index].item():.3g}"
            )
        if rms and ratio.numel() >= 256:
            mean = ratio.square().mean().sqrt().item()
            assert mean <= 0.6, f"{what}: root mean square of error / bound is {mean:.3g}"


def rounding(dtype: torch.dtype, interpreted: bool = False) -> float:
    """The relative error of one rounding to ``dtype``. The interpreter truncates to bfloat16."""
    eps = torch.finfo(dtype).eps
    return eps if interpreted and dtype == torch.bfloat16 else eps / 2


def _stored(value: Tensor, dtype: torch.dtype, interpreted: bool) -> Tensor:
    """The error of storing ``value``: relative, and one step of the subnormal numbers.

    Numbers in float32 and its like may be flushed to zero below the normal ones.
    """
    info = torch.finfo(dtype)
    step = info.smallest_normal * (info.eps if dtype == torch.float16 else 1.0)
    return rounding(dtype, interpreted) * value.abs() + step


def _longest_run(t: Tensor) -> int:
    """How many equal values of a channel follow one another, batch first or last, at most."""
    if t.numel() == 0:
        return 1
    longest = 1
    channels = t.transpose(0, 1)
    for values in (channels.flatten(1), channels.movedim(1, -1).flatten(1)):
        same = values[:, 1:] == values[:, :-1]
        place = torch.arange(1, same.shape[1] + 1)
        broken = torch.where(same, 0, place).cummax(1).values
        longest = max(longest, int((place - broken).max()) + 1 if same.numel() else 1)
    return longest


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    activation: Activation | str | None = None,
    dy: Tensor | None = None,
    output: Tensor | None = None,
    interpreted: bool = False,
    moments: bool = False,
    device: torch.device | None = None,
) -> dict[str, Bounded]:
    """y; where dy is given dx, dweight, dbias, dresidual; in training running_mean and running_var.

    The running statistics are the ones *before* the call, and are left alone.

    Args:
        output: y as it was returned. Which of two slopes a value has is told by it, as PyTorch's activation
            does: what was rounded to 0 (or to relu6's 6) has the slope that is there.
        interpreted: whether the bounds are for Triton's interpreter, which rounds to bfloat16 and takes
            sums less well than a GPU.
        moments: whether mean and invstd (1/std) are wanted too, as an accumulator's dtype holds them.
        device: where to compute; the CPU by default.
    """
    where = device or torch.device("cpu")
    activation = Activation.of(activation)
    dtype, channels = x.dtype, x.shape[1]
    double = dtype == torch.float64
    # The oracle itself rounds to float64: there its own errors are as large as those it judges.
    u = rounding(torch.float64) * 2 if double else rounding(torch.float32)
    over = [d for d in range(x.dim()) if d != 1]
    count = x.numel() // channels
    # The interpreter adds the up to 512 rows of a tile one after another, which is a walk of as many steps.
    steps = min(count, 512)

    def depth(t: Tensor) -> float:
        """How many roundings of its size a sum of these values may lose.

        Steps of a walk average out to their square root. Equal values that follow one another are rounded
        the same way, though: steps / run groups, in each of which run roundings add up.
        """
        if not interpreted:
            return math.log2(count) + 4
        return math.log2(count) + max(math.sqrt(steps * min(_longest_run(t), steps)), 4)

    def wide(t: Tensor | None, default: float = 0.0) -> Tensor:
        """A channel's vector in float64, beside x."""
        t = torch.full((channels,), default) if t is None else t.detach()
        return t.to(where, torch.float64).reshape(-1, *[1] * (x.dim() - 2))

    def mean_of(t: Tensor) -> Tensor:
        return t.mean(over, keepdim=True).squeeze(0)

    def narrow(t: Tensor, like: Tensor) -> Tensor:
        return t.reshape(like.shape)

    results: dict[str, Bounded] = {}
    v = x.detach().to(where, torch.float64)
    if training:
        mean = mean_of(v)
        var = mean_of((v - mean).square())
        e_mean = u * (2 * mean.abs() + depth(v) * mean_of((v - mean).abs()))
        e_var = 2 * depth(v) * u * var
        for name, old, batch, e_batch in (
            ("running_mean", running_mean, mean, e_mean),
            ("running_var", running_var, var * count / (count - 1), e_var * count / (count - 1)),
        ):
            if old is None:
                continue
            new = (1 - momentum) * wide(old) + momentum * batch
            error = abs(momentum) * (e_batch + 3 * u * batch.abs())
            error = error + 3 * u * abs(1 - momentum) * wide(old).abs()
            error = error + _stored(new, old.dtype, interpreted)
            results[name] = Bounded(narrow(new, old), narrow(error, old))
    else:
        mean, var = wide(running_mean), wide(running_var)
        e_mean = e_var = torch.zeros_like(mean)
    invstd = (var + eps).rsqrt()
    lower, upper = ((var + e_var + eps).rsqrt(), ((var - e_var).clamp_min(0) + eps).rsqrt())
    e_invstd = torch.maximum(1 - lower / invstd, upper / invstd - 1) + 4 * u  # relative

    if moments:
        acc = torch.float64 if double else torch.float32
        for name, value, error in (("mean", mean, e_mean), ("invstd", invstd, e_invstd * invstd)):
            error = error + _stored(value, acc, interpreted)
            results[name] = Bounded(value.reshape(channels), error.reshape(channels))

    gamma, beta = wide(weight, 1.0), wide(bias)
    centred = v - mean
    xhat = centred * invstd
    z = gamma * xhat + beta
    e_z = (gamma * invstd).abs() * e_mean + (gamma * xhat).abs() * (e_invstd + 3 * u)
    e_z = e_z + u * (beta.abs() + z.abs())
    if residual is not None:
        z = z + residual.detach().to(where, torch.float64)
        e_z = e_z + u * z.abs()

    def sway(f: Callable[[Tensor, Activation | None], Tensor]) -> Tensor:
        """How much f changes within the error of z."""
        at = f(z, activation)
        return torch.maximum(
            (f(z - e_z, activation) - at).abs(), (f(z + e_z, activation) - at).abs()
        )

    y = activate(z, activation)
    smooth = activation is not None and activation.name not in PIECEWISE_LINEAR
    e_y = sway(activate) + u * y.abs() + (4 * u * (y.abs() + z.abs()) if smooth else 0)
    results["y"] = Bounded(y, e_y + _stored(y, dtype, interpreted))
    if dy is None:
        return results

    grad = dy.detach().to(where, torch.float64)
    told = output is not None and activation is not None and activation.output_tells
    seen = z if output is None or not told else output.detach().to(where, torch.float64)
    g = grad * slope(seen, activation)
    e_g = u * g.abs() + (4 * u * grad.abs() * (1 + z.abs()) if smooth else 0)
    if activation is not None and not told:
        e_g = e_g + grad.abs() * sway(slope)

    def total(t: Tensor) -> Tensor:
        return mean_of(t) * count

    sum_g, sum_gx = total(g), total(g * centred)
    e_sum_g = depth(g) * u * total(g.abs()) + total(e_g)
    e_sum_gx = (depth(g * centred) + 3) * u * total((g * centred).abs()) + total(
        e_g * centred.abs()
    )
    e_sum_gx = e_sum_gx + e_mean * (sum_g.abs() + e_sum_g)

    def channel(name: str, like: Tensor | None, value: Tensor, error: Tensor) -> None:
        if like is not None:
            error = error + _stored(value, like.dtype, interpreted)
            results[name] = Bounded(narrow(value, like), narrow(error, like))

    dweight = sum_gx * invstd
    e_dweight = invstd * e_sum_gx + dweight.abs() * (e_invstd + 2 * u)
    channel("dweight", weight, dweight, e_dweight)
    channel("dbias", bias, sum_g, e_sum_g)
    if residual is not None:
        results["dresidual"] = Bounded(g, e_g + _stored(g, dtype, interpreted))

    scale = (gamma * invstd).abs()
    if training:
        m1, m2 = sum_g / count, dweight / count
        dx = gamma * invstd * (g - m1 - xhat * m2)
        e_xhat = invstd * e_mean + xhat.abs() * (e_invstd + 2 * u)
        e_dx = e_g + e_sum_g / count + xhat.abs() * e_dweight / count + m2.abs() * e_xhat
        e_dx = scale * (e_dx + 3 * u * (g.abs() + m1.abs() + (xhat * m2).abs()))
    else:
        dx = gamma * invstd * g
        e_dx = scale * e_g
    e_dx = e_dx + dx.abs() * (e_invstd + 2 * u) + _stored(dx, dtype, interpreted)
    results["dx"] = Bounded(dx, e_dx)
    return results


def observe(
    call: Callable[[Tensor, Tensor | None], Tensor],
    layer: torch.nn.modules.batchnorm._BatchNorm,
    x: Tensor,
    dy: Tensor,
    residual: Tensor | None = None,
) -> dict[str, Tensor]:
    """What ``call(x, residual)``, a training step of ``layer``, gives; named as there.

    The gradients are those of x, residual and the layer's parameters, dy being the output's.
    """
    leaves = {"dx": x, "dresidual": residual, "dweight": layer.weight, "dbias": layer.bias}
    wanted = {name: t for name, t in leaves.items() if t is not None}
    for name in ("dx", "dresidual"):
        if name in wanted:
            wanted[name] = wanted[name].detach().requires_grad_()
    y = call(wanted["dx"], wanted.get("dresidual"))
    gradients = torch.autograd.grad(y, list(wanted.values()), dy)
    found = {"y": y.detach(), **dict(zip(wanted, gradients, strict=True))}
    for name in ("running_mean", "running_var"):
        buffer = getattr(layer, name)
        if buffer is not None:
            found[name] = buffer
    return found
