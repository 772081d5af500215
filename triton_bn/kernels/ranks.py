"""What stands between local work and what processes exchange, where several of them share a batch.

A process sends its moments as a *row* of float64, [2 * C + 2]: the means, the M2, the count, and a tag
by which the processes see that they mean the same thing (:mod:`triton_bn.sync`). Each program takes G
channels.
"""

import triton
import triton.language as tl

from triton_bn.kernels.backward import merge_sums, store_parameters
from triton_bn.kernels.forward import publish
from triton_bn.kernels.moments import Moments, merge, merge_axis, merge_partials
from triton_bn.kernels.tile import index


@triton.jit
def row_kernel(
    p_partials, p_x, taking, p_row, count, tag, sizes, strides, partial, T: tl.constexpr
):
    """The row of this process, from :func:`triton_bn.kernels.moments.moments_kernel`'s partials."""
    channel = index(tl.program_id(0) * T.G + tl.arange(0, T.G), T)
    mask = channel < sizes[1]
    a = merge_partials(p_partials, p_x, taking, channel, sizes, strides, partial, T)
    tl.store(p_row + channel, a.mean, mask=mask)
    tl.store(p_row + sizes[1] + channel, a.m2, mask=mask)
    if tl.program_id(0) == 0:
        if taking[1] is not None:
            count = tl.load(taking[1])
        tl.store(p_row + 2 * sizes[1], tl.cast(count, tl.float64))
        tl.store(p_row + 2 * sizes[1] + 1, tl.cast(tag, tl.float64))


@triton.jit
def merge_rows_kernel(
    p_rows, p_moments, p_count, p_agree, running, momentum, channels, ranks,
    CUMULATIVE: tl.constexpr, PARTLY: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Mean and biased variance [2, C] of all rows, merged in their order, and their count, for each
    channel [C]; advances the running statistics. Where no rank has a value, only the count is written.

    p_agree: whether the tags are equal and there is not one value a channel in all, as 1.0 or 0.0. PARTLY: one
    value may take part by a mask.
    """
    channel = tl.program_id(0) * T.G + tl.arange(0, T.G)
    mask = channel < channels
    row = 2 * channels + 2
    zero = tl.full((T.G,), 0.0, tl.dtype(T.ACC))
    a = Moments(zero, zero, zero)
    tag = tl.load(p_rows + row - 1)
    differ = 0
    for start in range(0, ranks, T.Q):
        rank = start + tl.arange(0, T.Q)
        p = p_rows + rank * row
        within = rank < ranks
        count = tl.load(p + row - 2, mask=within, other=0.0)[:, None]
        other = tl.load(p + row - 1, mask=within, other=0.0)
        differ += tl.sum((within & (other != tag)).to(tl.int32), 0)
        within = within[:, None] & mask[None, :]
        mean = tl.load(p[:, None] + channel[None, :], mask=within, other=0.0)
        m2 = tl.load(p[:, None] + channels + channel[None, :], mask=within, other=0.0)
        a = merge(a, merge_axis(Moments(tl.where(within, count, 0.0), mean, m2), 0))
    variance = a.m2 / tl.maximum(a.count, 1)
    m_any = mask & (a.count > 0)
    publish(
        p_moments, running, momentum, a, variance, channel, m_any, channels, CUMULATIVE, PARTLY, T
    )
    tl.store(p_count + channel, a.count, mask=mask)
    if tl.program_id(0) == 0:
        alone = False if PARTLY else tl.max(a.count, 0) == 1
        tl.store(p_agree, ((differ == 0) & (alone == 0)).to(tl.float64))


@triton.jit
def sums_kernel(p_partials, p_sums, p_stats, dparameters, sizes, partial, T: tl.constexpr):
    """sum(g) and sum(g * (x - mean)) [2, C] of this process, dweight and dbias where wanted.

    p_partials: those of :func:`triton_bn.kernels.backward.backward_reduce_kernel`.
    """
    channel = index(tl.program_id(0) * T.G + tl.arange(0, T.G), T)
    mask = channel < sizes[1]
    sums = merge_sums(p_partials, channel, sizes, partial, T)
    tl.store(p_sums + channel, sums.g, mask=mask)
    tl.store(p_sums + sizes[1] + channel, sums.product, mask=mask)
    store_parameters(dparameters, sums, p_stats, channel, mask, sizes[1], T)
