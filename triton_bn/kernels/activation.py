"""Each activation once: its value and its derivative, from its input z, as PyTorch defines them."""

import triton
import triton.language as tl


@triton.jit
def expm1(z):
    """exp(z) - 1 for z <= 0, by its series where the subtraction would cancel."""
    DEGREE: tl.constexpr = 13 if z.dtype == tl.float64 else 7
    series = tl.full(z.shape, 1.0, z.dtype)
    for i in tl.static_range(DEGREE, 1, -1):
        series = 1 + z * series / i
    return tl.where(z > -0.25, z * series, tl.exp(z) - 1)


@triton.jit
def tanh(z):
    e = expm1(-2 * tl.abs(z))
    t = -e / (e + 2)
    return tl.where(z < 0, -t, t)


@triton.jit
def tanh_softplus(z):
    """tanh(log(1 + exp(z))) = (e*e + 2*e) / (e*e + 2*e + 2); beyond 20 it is 1 in every dtype."""
    e = tl.exp(tl.minimum(z, 20.0))
    return tl.where(z > 20.0, 1.0, e * (e + 2) / (e * (e + 2) + 2))


@triton.jit
def normal_cdf(z):
    return 0.5 * (1 + tl.erf(z * 0.7071067811865476))


@triton.jit
def activate(z, T: tl.constexpr):
    """activation(z). NaN stays NaN: comparisons are written so that it falls through.

    Straight pieces are maxima and minima, an instruction each. Of a comparison with a constant LLVM makes a select
    on the rounded 16-bit values, which no instruction does for two at a time.
    """
    SIXTH: tl.constexpr = 0.16666666666666666
    if T.KIND is None:
        return z
    elif T.KIND == "relu":
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif T.KIND == "relu6":
        return tl.clamp(z, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif T.KIND == "leaky_relu":
        if T.PARAMETER > 0 and T.PARAMETER <= 1:
            return tl.maximum(z, z * T.PARAMETER, propagate_nan=tl.PropagateNan.ALL)
        else:
            return tl.where(z > 0, z, z * T.PARAMETER)
    elif T.KIND == "silu":
        return z * tl.sigmoid(z)
    elif T.KIND == "hardswish":
        return z * tl.clamp(z + 3, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL) * SIXTH
    elif T.KIND == "gelu":
        return z * normal_cdf(z)
    elif T.KIND == "elu":
        return tl.where(z < 0, T.PARAMETER * expm1(tl.minimum(z, 0.0)), z)
    elif T.KIND == "mish":
        return z * tanh_softplus(z)
    elif T.KIND == "sigmoid":
        return tl.sigmoid(z)
    else:
        tl.static_assert(T.KIND == "tanh")
        return tanh(z)


@triton.jit
def steep(z, T: tl.constexpr):
    """For the activations with two slopes: whether the slope at z is 1. NaN goes as in PyTorch."""
    if T.KIND == "relu":
        return (z <= 0) == 0
    elif T.KIND == "relu6":
        return ((z <= 0) | (z >= 6)) == 0
    else:
        tl.static_assert(T.KIND == "leaky_relu")
        return z > 0


@triton.jit
def gradient_by_bit(dy, bit, T: tl.constexpr):
    """dy * slope for the activations with two slopes; where the slope is 0, so is the product."""
    if T.KIND == "leaky_relu":
        return tl.where(bit, dy, dy * T.PARAMETER)
    else:
        return tl.where(bit, dy, 0.0)


@triton.jit
def slope(z, T: tl.constexpr):
    """The derivative at z of the activations that are no two straight lines."""
    if T.KIND == "silu":
        s = tl.sigmoid(z)
        return s * (1 + z * (1 - s))
    elif T.KIND == "hardswish":
        return tl.where(z <= -3, 0.0, tl.where(z >= 3, 1.0, z * 0.3333333333333333 + 0.5))
    elif T.KIND == "gelu":
        return normal_cdf(z) + z * tl.exp(-0.5 * z * z) * 0.3989422804014327
    elif T.KIND == "elu":
        return tl.where(z > 0, 1.0, T.PARAMETER * tl.exp(z))
    elif T.KIND == "mish":
        t = tanh_softplus(z)
        return t + z * (1 - t * t) * tl.sigmoid(z)
    elif T.KIND == "sigmoid":
        s = tl.sigmoid(z)
        return s * (1 - s)
    else:
        tl.static_assert(T.KIND == "tanh")
        t = tanh(z)
        return 1 - t * t


@triton.jit
def gradient(dy, z, T: tl.constexpr):
    """dy * activation'(z)."""
    if T.KIND == "relu" or T.KIND == "relu6" or T.KIND == "leaky_relu":
        return gradient_by_bit(dy, steep(z, T), T)
    else:
        return dy * slope(z, T)
