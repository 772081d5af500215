"""The gradients: sums (:func:`backward_reduce_kernel`), dx from them (:func:`backward_apply_kernel`), both at once.

With g = dy * activation'(z), sums over a channel's M values, and for batch statistics::

    dbias = sum(g)      dweight = sum(g * (x - mean)) * invstd      dresidual = g
    dx = weight * invstd * (g - sum(g) / M - (x - mean) * invstd**2 * sum(g * (x - mean)) / M)

For running statistics, which do not depend on x, dx = weight * invstd * g.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from triton_bn.kernels.activation import gradient, gradient_by_bit, steep
from triton_bn.kernels.forward import column_affine, load_residual, preactivation
from triton_bn.kernels.moments import partial_shares
from triton_bn.kernels.tile import (
    fold_sums,
    how_many,
    index,
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
    tile_offsets,
    touched,
)


class Sums(NamedTuple):
    """sum(g) and sum(g * (x - mean))."""

    g: Any
    product: Any


@triton.jit
def load_bits(p_bits, n, n_end, row, columns, U: tl.constexpr, T: tl.constexpr):
    """The bytes [R, K / 8] that the forward packed, of U tiles below one another, if it did."""
    tiles = ()
    if p_bits is not None:
        byte = columns.begin // 8 + tl.arange(0, T.K // 8)
        m_byte = (byte * 8 < columns.end)[None, :]
        for u in tl.static_range(U):
            offsets = tile_offsets(n + u * T.R, (row + 7) // 8, byte, 1, T)
            mask = (n + u * T.R + tl.arange(0, T.R) < n_end)[:, None] & m_byte
            tiles = tiles + (tl.load(p_bits + offsets, mask=mask, other=0),)
    return tiles


@triton.jit
def unpack(packed, T: tl.constexpr):
    """[R, K] booleans from bytes [R, K / 8], lowest bit first."""
    bit = (packed.to(tl.int32)[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bit, (T.R, T.K)) != 0


@triton.jit
def gradient_tile(dy, x, residual, packed, takes, u: tl.constexpr, affine, T: tl.constexpr):
    """g [R, K] of a chunk's tile u: dy as it came where there is no activation, else of the accumulation dtype.

    The slope is in the packed bits, or told by y (in the residual's place), or follows from x and the
    residual, if any.
    """
    if T.KIND is None:
        return select(takes, u, dy[u])
    elif len(packed) > 0:
        return select(takes, u, gradient_by_bit(dy[u].to(tl.dtype(T.ACC)), unpack(packed[u], T), T))
    elif T.OUTPUT:
        bit = steep(residual[u].to(tl.dtype(T.ACC)), T)
        return select(takes, u, gradient_by_bit(dy[u].to(tl.dtype(T.ACC)), bit, T))
    else:
        g = gradient(dy[u].to(tl.dtype(T.ACC)), preactivation(x, residual, u, affine, T), T)
        return select(takes, u, g)


@triton.jit
def add_tile(sums, g, x, takes, u: tl.constexpr, affine, T: tl.constexpr):
    """The sums of the slots [R, K], with one more tile."""
    g = g.to(tl.dtype(T.ACC))
    total = sums.g + g
    centered = select(takes, u, x[u].to(tl.dtype(T.ACC)) - affine.mean)
    return Sums(total, sums.product + g * centered)


@triton.jit
def load_statistics(p_stats, parameters, columns, channels, T: tl.constexpr):
    """invstd [1, K], and the transform of each column."""
    mean = load_columns(p_stats, 1, columns, 0.0, T)
    invstd = load_columns(p_stats + channels, 1, columns, 0.0, T)
    return invstd, column_affine(mean, invstd, parameters, columns, T)


@triton.jit
def merge_sums(p_partials, channel, sizes, partial, T: tl.constexpr):
    """The sums of channels [G] from all their partials: Q at a time, [Q, G], added up at the end."""
    total = tl.full((T.Q, T.G), 0.0, tl.dtype(T.ACC))
    product = tl.full((T.Q, T.G), 0.0, tl.dtype(T.ACC))
    last = index(partial[1] * partial[2], T)
    for start in range(0, last, T.Q):
        q = start + tl.arange(0, T.Q)
        mask = partial_shares(q, channel, sizes, partial, T) > 0
        o = q[:, None] * sizes[1] + channel[None, :]
        total += tl.load(p_partials + o, mask=mask, other=0.0)
        product += tl.load(p_partials + last * sizes[1] + o, mask=mask, other=0.0)
    return Sums(tl.sum(total, 0), tl.sum(product, 0))


@triton.jit
def store_parameters(dparameters, sums, p_stats, channel, mask, channels, T: tl.constexpr):
    """dweight and dbias of some channels, each where wanted."""
    if dparameters[0] is not None:
        invstd = tl.load(p_stats + channels + channel, mask=mask, other=0.0)
        dweight = tl.cast(sums.product * invstd, dparameters[0].dtype.element_ty)
        tl.store(dparameters[0] + channel, dweight, mask=mask)
    if dparameters[1] is not None:
        tl.store(
            dparameters[1] + channel, tl.cast(sums.g, dparameters[1].dtype.element_ty), mask=mask
        )


@triton.jit
def project(sums, count, invstd, affine, columns, T: tl.constexpr):
    """Per column [1, K], what makes dx = scale * g + lost.g + lost.product * (x - mean), scale being weight * invstd:
    -scale * sum(g) / M, and -scale * sum(g * (x - mean)) / M * invstd**2."""
    m = tl.cast(count, tl.dtype(T.ACC))
    product = spread(sums.product / m, columns, T) * invstd * invstd
    return Sums(-affine.scale * spread(sums.g / m, columns, T), -affine.scale * product)


@triton.jit
def store_gradients(
    g,
    x,
    takes,
    u: tl.constexpr,
    p_dx,
    p_dresidual,
    n,
    n_end,
    row,
    columns,
    affine,
    lost,
    RAGGED: tl.constexpr,
    T: tl.constexpr,
):
    """Writes dresidual and dx of one tile. ``lost`` is None for running statistics."""
    if p_dresidual is not None:
        store_dense(p_dresidual, g, n, n_end, row, columns, RAGGED, T)
    if p_dx is not None:
        if lost is None:
            dx = g.to(tl.dtype(T.ACC)) * affine.scale
        else:
            dx = tl.fma(g.to(tl.dtype(T.ACC)), affine.scale, lost.g)
            dx = tl.fma(x[u].to(tl.dtype(T.ACC)) - affine.mean, lost.product, dx)
            dx = select(takes, u, dx)
        store_dense(p_dx, dx, n, n_end, row, columns, RAGGED, T)


@triton.jit
def reduce_item(
    p_dy, p_x, p_residual, p_bits, taking, parameters, p_stats, p_partials, i_block, i_split,
    sizes, strides, partial, T: tl.constexpr,
):  # fmt: skip
    """Partial sum(g) and sum(g * (x - mean)) of the channels in a block of columns and a range of rows.

    p_partials: [2, splits * blocks, C], as in :func:`triton_bn.kernels.moments.moments_item`.
    """
    DEPTH: tl.constexpr = T.U
    row = row_length(sizes[1], sizes[2], T)
    columns = tile_columns(index(i_block, T) * T.K, row, sizes[2], strides, T)
    _, affine = load_statistics(p_stats, parameters, columns, sizes[1], T)
    n_begin, n_ragged, n_end = row_range(i_split, partial[0], sizes[0], T)
    zero = tl.full((T.R, T.K), 0.0, tl.dtype(T.ACC))
    sums = Sums(zero, zero)
    for n in tl.range(n_begin, n_ragged, T.R * T.U, num_stages=T.STAGES):
        x = load_chunk(
            p_x, n, n_end, strides[0], columns.offset, columns, T.U, T.U, "evict_last", T
        )
        dy = load_chunk(p_dy, n, n_end, row, columns.k, columns, T.U, T.U, "evict_last", T)
        residual = load_residual(p_residual, n, n_end, row, columns, T.U, T.U, "evict_last", T)
        packed = load_bits(p_bits, n, n_end, row, columns, T.U, T)
        takes = load_takes(taking[0], n, n_end, sizes[2], columns, T.U, T)
        for u in tl.static_range(DEPTH):
            g = gradient_tile(dy, x, residual, packed, takes, u, affine, T)
            sums = add_tile(sums, g, x, takes, u, affine, T)
    for n in range(n_ragged, n_end, T.R):
        x = load_chunk(p_x, n, n_end, strides[0], columns.offset, columns, 1, 0, "evict_last", T)
        dy = load_chunk(p_dy, n, n_end, row, columns.k, columns, 1, 0, "evict_last", T)
        residual = load_residual(p_residual, n, n_end, row, columns, 1, 0, "evict_last", T)
        packed = load_bits(p_bits, n, n_end, row, columns, 1, T)
        takes = load_takes(taking[0], n, n_end, sizes[2], columns, 1, T)
        g = gradient_tile(dy, x, residual, packed, takes, 0, affine, T)
        sums = add_tile(sums, g, x, takes, 0, affine, T)

    channel = touched(columns, sizes, T)
    q = i_split * partial[2] + i_block - channel * sizes[2] // T.K
    o = q * sizes[1] + channel
    tl.store(p_partials + o, fold_sums(sums.g, columns, T), mask=channel < sizes[1])
    o += index(partial[1] * partial[2], T) * sizes[1]
    tl.store(p_partials + o, fold_sums(sums.product, columns, T), mask=channel < sizes[1])


@triton.jit
def backward_reduce_kernel(
    p_dy,
    p_x,
    p_residual,
    p_bits,
    taking,
    parameters,
    p_stats,
    p_partials,
    sizes,
    strides,
    partial,
    T: tl.constexpr,
):
    """The first launch of split: every :func:`reduce_item`."""
    n_blocks = tl.cdiv(row_length(sizes[1], sizes[2], T), T.K)
    pid = tl.program_id(0)
    reduce_item(
        p_dy, p_x, p_residual, p_bits, taking, parameters, p_stats, p_partials, pid % n_blocks, pid // n_blocks,
        sizes, strides, partial, T,
    )  # fmt: skip


@triton.jit
def apply_item(
    p_dy, p_x, p_residual, p_bits, taking, parameters, p_stats, p_partials, p_dx, p_dresidual, dparameters, count,
    i_block, i_split, sizes, strides, rows, partial, TRAINING: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """dx, dresidual, dweight and dbias (each where wanted) from the merged sums over ``count`` values a channel.

    Without TRAINING no sums enter dx; without p_partials none are merged, and p_x may be None.
    """
    DEPTH: tl.constexpr = T.U
    row = row_length(sizes[1], sizes[2], T)
    columns = tile_columns(index(i_block, T) * T.K, row, sizes[2], strides, T)
    invstd, affine = load_statistics(p_stats, parameters, columns, sizes[1], T)
    lost = None
    if p_partials is not None:
        channel = touched(columns, sizes, T)
        sums = merge_sums(p_partials, channel, sizes, partial, T)
        owner = owns(channel, i_block, i_split, sizes, T)
        store_parameters(dparameters, sums, p_stats, channel, owner, sizes[1], T)
        if TRAINING:
            lost = project(sums, how_many(taking, count), invstd, affine, columns, T)
    if p_dx is not None or p_dresidual is not None:
        n_begin, n_ragged, n_end = row_range(i_split, rows, sizes[0], T)
        for n in tl.range(n_begin, n_ragged, T.R * T.U, num_stages=T.STAGES):
            dy = load_chunk(p_dy, n, n_end, row, columns.k, columns, T.U, T.U, "evict_first", T)
            x = dy
            if p_x is not None:
                x = load_chunk(
                    p_x, n, n_end, strides[0], columns.offset, columns, T.U, T.U, "evict_first", T
                )
            residual = load_residual(p_residual, n, n_end, row, columns, T.U, T.U, "evict_first", T)
            packed = load_bits(p_bits, n, n_end, row, columns, T.U, T)
            takes = load_takes(taking[0], n, n_end, sizes[2], columns, T.U, T)
            for u in tl.static_range(DEPTH):
                g = gradient_tile(dy, x, residual, packed, takes, u, affine, T)
                i_row = n + u * T.R
                store_gradients(
                    g,
                    x,
                    takes,
                    u,
                    p_dx,
                    p_dresidual,
                    i_row,
                    n_end,
                    row,
                    columns,
                    affine,
                    lost,
                    False,
                    T,
                )
        for n in range(n_ragged, n_end, T.R):
            dy = load_chunk(p_dy, n, n_end, row, columns.k, columns, 1, 0, "evict_first", T)
            x = dy
            if p_x is not None:
                x = load_chunk(
                    p_x, n, n_end, strides[0], columns.offset, columns, 1, 0, "evict_first", T
                )
            residual = load_residual(p_residual, n, n_end, row, columns, 1, 0, "evict_first", T)
            packed = load_bits(p_bits, n, n_end, row, columns, 1, T)
            takes = load_takes(taking[0], n, n_end, sizes[2], columns, 1, T)
            g = gradient_tile(dy, x, residual, packed, takes, 0, affine, T)
            store_gradients(
                g, x, takes, 0, p_dx, p_dresidual, n, n_end, row, columns, affine, lost, True, T
            )


@triton.jit
def backward_apply_kernel(
    p_dy, p_x, p_residual, p_bits, taking, parameters, p_stats, p_partials, p_dx, p_dresidual, dparameters, count,
    sizes, strides, rows, partial, TRAINING: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """The second launch of split: every :func:`apply_item`, backwards for what is still in L2."""
    n_blocks = tl.cdiv(row_length(sizes[1], sizes[2], T), T.K)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    apply_item(
        p_dy, p_x, p_residual, p_bits, taking, parameters, p_stats, p_partials, p_dx, p_dresidual, dparameters,
        count, pid % n_blocks, pid // n_blocks, sizes, strides, rows, partial, TRAINING, T,
    )  # fmt: skip


@triton.jit
def backward_kernel(
    p_dy, p_x, p_residual, p_bits, taking, parameters, p_stats, p_dx, p_dresidual, dparameters, sizes, strides,
    TRAINING: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """All gradients in one read: a program holds x and dy of CHANNELS whole channels in registers."""
    DEPTH: tl.constexpr = T.U
    row = row_length(sizes[1], T.INNER, T)
    first = tl.program_id(0) * T.CHANNELS
    begin = index(tl.program_id(0), T) * (T.CHANNELS * T.INNER)
    end = tl.minimum(begin + T.CHANNELS * T.INNER, row)
    columns = tile_columns(begin, end, T.INNER, strides, T)
    invstd, affine = load_statistics(p_stats, parameters, columns, sizes[1], T)
    x = load_chunk(
        p_x, 0, sizes[0], strides[0], columns.offset, columns, T.U, T.WHOLE, "evict_first", T
    )
    dy = load_chunk(p_dy, 0, sizes[0], row, columns.k, columns, T.U, T.WHOLE, "evict_first", T)
    residual = load_residual(p_residual, 0, sizes[0], row, columns, T.U, T.WHOLE, "evict_first", T)
    packed = load_bits(p_bits, 0, sizes[0], row, columns, T.U, T)
    takes = load_takes(taking[0], 0, sizes[0], T.INNER, columns, T.U, T)
    zero = tl.full((T.R, T.K), 0.0, tl.dtype(T.ACC))
    sums = Sums(zero, zero)
    g = ()
    for u in tl.static_range(DEPTH):
        tile = gradient_tile(dy, x, residual, packed, takes, u, affine, T)
        sums = add_tile(sums, tile, x, takes, u, affine, T)
        g = g + (tile,)
    sums = Sums(fold_sums(sums.g, columns, T), fold_sums(sums.product, columns, T))
    channel = first + tl.arange(0, T.G)
    mask = (tl.arange(0, T.G) < T.CHANNELS) & (channel < sizes[1])
    store_parameters(dparameters, sums, p_stats, channel, mask, sizes[1], T)
    lost = None
    if TRAINING:
        lost = project(sums, how_many(taking, sizes[0] * T.INNER), invstd, affine, columns, T)
    for u in tl.static_range(DEPTH):
        store_gradients(
            g[u],
            x,
            takes,
            u,
            p_dx,
            p_dresidual,
            u * T.R,
            sizes[0],
            row,
            columns,
            affine,
            lost,
            u >= T.WHOLE,
            T,
        )
