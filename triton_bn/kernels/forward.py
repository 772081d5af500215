"""The transform, alone (:func:`normalize_kernel`) and with the moments (:func:`forward_kernel`)."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from triton_bn.kernels.activation import activate, steep
from triton_bn.kernels.moments import Moments, held_moments, merge_partials
from triton_bn.kernels.tile import (
    double,
    index,
    inverse_std,
    load_chunk,
    load_columns,
    load_takes,
    owns,
    row_length,
    row_range,
    select,
    spread,
    store_dense,
    tile_columns,
    tile_mask,
    tile_offsets,
    touched,
)


class Affine(NamedTuple):
    """z = (x - mean) * scale + bias, each [1, K], or [1, 1] where all columns are of one channel."""

    mean: Any
    scale: Any
    bias: Any


@triton.jit
def column_affine(mean, invstd, parameters, columns, T: tl.constexpr):
    """The transform of each column from its statistics [1, K] and (weight, bias)."""
    weight = load_columns(parameters[0], 1, columns, 1.0, T)
    return Affine(mean, invstd * weight, load_columns(parameters[1], 1, columns, 0.0, T))


@triton.jit
def preactivation(x, residual, u: tl.constexpr, affine, T: tl.constexpr):
    """z = (x - mean) * scale + bias + residual of a chunk's tile u; there may be no tiles of a residual.

    Centred first: x * scale + (bias - mean * scale) would save an addition and lose the digits
    that x and mean share. Forward and backward call this very function, so that both see the same z.
    """
    z = tl.fma(x[u].to(tl.dtype(T.ACC)) - affine.mean, affine.scale, affine.bias)
    if len(residual) == 0:
        return z
    else:
        return z + residual[u].to(tl.dtype(T.ACC))


@triton.jit
def store_bits(p_bits, bit, n, n_end, row, columns, T: tl.constexpr):
    """Packs [R, K] booleans, lowest bit first. A row's bits start on a byte, and so do a tile's."""
    weighted = tl.reshape(bit.to(tl.int32), (T.R, T.K // 8, 8)) << tl.arange(0, 8)[None, None, :]
    byte = columns.begin // 8 + tl.arange(0, T.K // 8)
    offsets = tile_offsets(n, (row + 7) // 8, byte, 1, T)
    mask = (n + tl.arange(0, T.R) < n_end)[:, None] & (byte * 8 < columns.end)[None, :]
    tl.store(p_bits + offsets, tl.sum(weighted, 2).to(tl.uint8), mask=mask)


@triton.jit
def transform_tile(
    x, residual, takes, u: tl.constexpr, p_y, p_bits, n, n_end, row, columns, affine,
    RAGGED: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Writes activation(z) of a chunk's tile u, and where p_bits is given, whether its slope is 1.

    The slope at z as rounded to the dtype of y: of all that follows, PyTorch's activation sees no more.
    """
    z = preactivation(x, residual, u, affine, T)
    store_dense(p_y, select(takes, u, activate(z, T)), n, n_end, row, columns, RAGGED, T)
    if p_bits is not None:
        rounded = z.to(p_y.dtype.element_ty).to(tl.dtype(T.ACC))
        bit = steep(rounded, T) & tile_mask(n, n_end, columns.mask, RAGGED, T)
        store_bits(p_bits, bit, n, n_end, row, columns, T)


@triton.jit
def load_residual(
    p_residual, n, n_end, row, columns,
    U: tl.constexpr, WHOLE: tl.constexpr, POLICY: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The residual of U tiles, if there is one. Before a store of theirs: behind one, none would be in flight."""
    return load_chunk(p_residual, n, n_end, row, columns.k, columns, U, WHOLE, POLICY, T)


@triton.jit
def publish(
    p_stats, running, momentum, a, invstd, channel, m_owner, channels,
    CUMULATIVE: tl.constexpr, PARTLY: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Stores the statistics of some channels for backward, and advances the running ones.

    running = (1 - f) * running + f * batch, with the unbiased variance; f is the momentum, or
    1 / num_batches_tracked (advanced by an earlier launch) for the cumulative average. PARTLY: there may be no
    value, which leaves them, or one, which leaves the variance.
    """
    tl.store(p_stats + channel, a.mean, mask=m_owner)
    tl.store(p_stats + channels + channel, invstd, mask=m_owner)
    if running[0] is not None:
        if CUMULATIVE:
            factor = 1 / tl.load(running[2]).to(tl.dtype(T.ACC))
        else:
            factor = double(momentum, tl.dtype(T.ACC))
        old_mean = tl.load(running[0] + channel, mask=m_owner, other=0.0).to(tl.dtype(T.ACC))
        old_var = tl.load(running[1] + channel, mask=m_owner, other=0.0).to(tl.dtype(T.ACC))
        mean = (1 - factor) * old_mean + factor * a.mean
        var = (1 - factor) * old_var + factor * (a.m2 / (a.count - 1))
        if PARTLY:
            mean = tl.where(a.count > 0, mean, old_mean)
            var = tl.where(a.count > 1, var, old_var)
        tl.store(running[0] + channel, tl.cast(mean, running[0].dtype.element_ty), mask=m_owner)
        tl.store(running[1] + channel, tl.cast(var, running[1].dtype.element_ty), mask=m_owner)


@triton.jit
def normalize_item(
    p_x, p_y, p_residual, p_bits, taking, parameters, p_stats, p_partials, running, momentum, eps,
    i_block, i_split, sizes, strides, rows, partial, CUMULATIVE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """y = activation((x - mean) * invstd * weight + bias + residual) over a block of columns and rows.

    With p_partials (of :func:`triton_bn.kernels.moments.moments_item`) it merges those of its channels first,
    and the first item to touch a channel publishes its statistics. Without, mean and variance are given:
    ``running``; without those, too, an earlier forward's mean and invstd: p_stats.
    """
    DEPTH: tl.constexpr = T.U
    row = row_length(sizes[1], sizes[2], T)
    columns = tile_columns(index(i_block, T) * T.K, row, sizes[2], strides, T)
    channel = touched(columns, sizes, T)
    owner = owns(channel, i_block, i_split, sizes, T)
    mask = channel < sizes[1]
    if p_partials is None and running[0] is None:
        mean = tl.load(p_stats + channel, mask=mask, other=0.0)
        invstd = tl.load(p_stats + sizes[1] + channel, mask=mask, other=0.0)
    elif p_partials is None:
        mean = tl.load(running[0] + channel, mask=mask, other=0.0).to(tl.dtype(T.ACC))
        variance = tl.load(running[1] + channel, mask=mask, other=0.0).to(tl.dtype(T.ACC))
        invstd = inverse_std(variance, eps, T)
        tl.store(p_stats + channel, mean, mask=owner)
        tl.store(p_stats + sizes[1] + channel, invstd, mask=owner)
    else:
        a = merge_partials(p_partials, p_x, taking, channel, sizes, strides, partial, T)
        mean = a.mean
        invstd = inverse_std(a.m2 / tl.maximum(a.count, 1), eps, T)
        publish(
            p_stats, running, momentum, a, invstd, channel, owner, sizes[1], CUMULATIVE, taking[1] is not None, T
        )  # fmt: skip
        if taking[1] is not None:
            tl.store(p_stats + 2 * sizes[1] + channel, a.count, mask=owner)
    affine = column_affine(
        spread(mean, columns, T), spread(invstd, columns, T), parameters, columns, T
    )
    n_begin, n_ragged, n_end = row_range(i_split, rows, sizes[0], T)
    for n in tl.range(n_begin, n_ragged, T.R * T.U, num_stages=T.STAGES):
        x = load_chunk(
            p_x, n, n_end, strides[0], columns.offset, columns, T.U, T.U, "evict_first", T
        )
        residual = load_residual(p_residual, n, n_end, row, columns, T.U, T.U, "evict_first", T)
        takes = load_takes(taking[0], n, n_end, sizes[2], columns, T.U, T)
        for u in tl.static_range(DEPTH):
            transform_tile(
                x,
                residual,
                takes,
                u,
                p_y,
                p_bits,
                n + u * T.R,
                n_end,
                row,
                columns,
                affine,
                False,
                T,
            )
    for n in range(n_ragged, n_end, T.R):
        x = load_chunk(p_x, n, n_end, strides[0], columns.offset, columns, 1, 0, "evict_first", T)
        residual = load_residual(p_residual, n, n_end, row, columns, 1, 0, "evict_first", T)
        takes = load_takes(taking[0], n, n_end, sizes[2], columns, 1, T)
        transform_tile(x, residual, takes, 0, p_y, p_bits, n, n_end, row, columns, affine, True, T)


@triton.jit
def normalize_kernel(
    p_x, p_y, p_residual, p_bits, taking, parameters, p_stats, p_partials, running, momentum, eps,
    sizes, strides, rows, partial, CUMULATIVE: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The second launch of split, and evaluation's only one: every :func:`normalize_item`.

    Backwards: what the moments read last is still in L2.
    """
    n_blocks = tl.cdiv(row_length(sizes[1], sizes[2], T), T.K)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    normalize_item(
        p_x, p_y, p_residual, p_bits, taking, parameters, p_stats, p_partials, running, momentum, eps,
        pid % n_blocks, pid // n_blocks, sizes, strides, rows, partial, CUMULATIVE, T,
    )  # fmt: skip


@triton.jit
def forward_kernel(
    p_x, p_y, p_residual, p_bits, taking, parameters, p_stats, running, momentum, eps, sizes, strides,
    T: tl.constexpr,
):  # fmt: skip
    """Training in one read: a program holds CHANNELS whole channels, U tiles of R rows, in registers.

    S is the constant INNER here, so that the compiler sees where 16-byte accesses may start.
    """
    DEPTH: tl.constexpr = T.U
    row = row_length(sizes[1], T.INNER, T)
    first = tl.program_id(0) * T.CHANNELS
    if running[2] is not None:
        if first == 0:
            tl.store(running[2], tl.load(running[2]) + 1)
    begin = index(tl.program_id(0), T) * (T.CHANNELS * T.INNER)
    end = tl.minimum(begin + T.CHANNELS * T.INNER, row)
    columns = tile_columns(begin, end, T.INNER, strides, T)
    x = load_chunk(
        p_x, 0, sizes[0], strides[0], columns.offset, columns, T.U, T.WHOLE, "evict_first", T
    )
    takes = load_takes(taking[0], 0, sizes[0], T.INNER, columns, T.U, T)
    channel = first + tl.arange(0, T.G)
    owner = (tl.arange(0, T.G) < T.CHANNELS) & (channel < sizes[1])
    a = held_moments(x, takes, taking, p_x, columns, channel, sizes, strides, T)
    invstd = inverse_std(a.m2 / a.count, eps, T)
    if taking[1] is not None:  # there may be none, by which nothing could be divided
        a = Moments(tl.load(taking[1]).to(tl.dtype(T.ACC)), a.mean, a.m2)
    publish(
        p_stats, running, momentum, a, invstd, channel, owner, sizes[1], False, taking[1] is not None, T
    )  # fmt: skip
    if taking[1] is not None:
        tl.store(p_stats + 2 * sizes[1] + channel, a.count, mask=owner)
    affine = column_affine(
        spread(a.mean, columns, T), spread(invstd, columns, T), parameters, columns, T
    )
    residual = load_residual(p_residual, 0, sizes[0], row, columns, T.U, T.WHOLE, "evict_first", T)
    for u in tl.static_range(DEPTH):
        transform_tile(
            x,
            residual,
            takes,
            u,
            p_y,
            p_bits,
            u * T.R,
            sizes[0],
            row,
            columns,
            affine,
            u >= T.WHOLE,
            T,
        )
