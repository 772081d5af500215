"""The gradients: sums (:func:`backward_reduce_kernel`), dx from them (:func:`backward_apply_kernel`), both at once.

With g = dy * activation'(z), sums over a channel's M values, and for batch statistics::

    dbias = sum(g)      dweight = sum(g * (x - mean)) * invstd      dresidual = g
    dx = weight * invstd * (g - sum(g) / M - (x - mean) * invstd**2 * sum(g * (x - mean)) / M)

For running statistics, which do not depend on x, dx = weight * invstd * g.
"""

import triton
import triton.language as tl

from triton_bn.kernels.activation import gradient, gradient_by_bit
from triton_bn.kernels.forward import column_vectors, preactivation
from triton_bn.kernels.moments import load_chunk, partial_shares
from triton_bn.kernels.tile import (
    fold_sums,
    load,
    load_channel,
    spread,
    store,
    tile_columns,
    tile_mask,
    tile_offsets,
)


@triton.jit
def load_bits(p_bits, n, n_end, row, begin, end, R: tl.constexpr, K: tl.constexpr, WIDE: tl.constexpr):
    """[R, K] booleans from the bytes that the forward packed."""
    byte = begin // 8 + tl.arange(0, K // 8)
    offsets = tile_offsets(n, (row + 7) // 8, byte, R, 1, WIDE)
    mask = tile_mask(n, n_end, byte * 8 < end, R, K // 8)
    packed = tl.load(p_bits + offsets, mask=mask, other=0).to(tl.int32)
    bit = (packed[:, :, None] >> tl.arange(0, 8)[None, None, :]) & 1
    return tl.reshape(bit, (R, K)) != 0


@triton.jit
def gradient_tile(
    dy, x, p_residual, p_bits, n, n_end, row, begin, end, k, m_column, vectors,
    R: tl.constexpr, K: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr, RAGGED: tl.constexpr,
    MASKED: tl.constexpr, KIND: tl.constexpr, PARAMETER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """g [R, K]: dy as it came where there is no activation, else of the accumulation dtype."""
    if KIND is None:
        return dy
    elif p_bits is not None:
        bit = load_bits(p_bits, n, n_end, row, begin, end, R, K, WIDE)
        return gradient_by_bit(dy.to(ACC), bit, KIND, PARAMETER)
    else:
        if p_residual is None:
            residual = None
        else:
            offsets = tile_offsets(n, row, k, R, VECTOR, WIDE)
            if RAGGED:
                mask = tile_mask(n, n_end, m_column, R, K)
            else:
                mask = tl.broadcast_to(m_column[None, :], (R, K))
            residual = load(p_residual, offsets, mask, RAGGED or MASKED, "evict_last").to(ACC)
        z = preactivation(x.to(ACC), vectors[0], vectors[1], vectors[2], residual)
        return gradient(dy.to(ACC), z, KIND, PARAMETER)


@triton.jit
def load_statistics(p_stats, affine, c, channels, m_column, ACC: tl.constexpr):
    """invstd [K], and the transform's vectors (:func:`column_vectors`)."""
    mean = tl.load(p_stats + c, mask=m_column, other=0.0)
    invstd = tl.load(p_stats + channels + c, mask=m_column, other=0.0)
    return invstd, column_vectors(mean, invstd, affine, c, m_column, ACC)


@triton.jit
def merge_sums(
    p_partials, c, sizes, rows, splits, blocks,
    K: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sum(g) and sum(g * (x - mean)) [G] of channels c from all their partials, in their order."""
    total = tl.zeros((G,), ACC)
    product = tl.zeros((G,), ACC)
    last = splits * blocks
    for start in range(0, last, Q):
        q = start + tl.arange(0, Q)
        share = partial_shares(q, c, sizes, rows, blocks, K)
        mask = (share > 0) & (q < last)[:, None] & (c < sizes[1])[None, :]
        o = q[:, None] * sizes[1] + c[None, :]
        total += tl.sum(tl.load(p_partials + o, mask=mask, other=0.0), 0)
        product += tl.sum(tl.load(p_partials + last * sizes[1] + o, mask=mask, other=0.0), 0)
    return total, product


@triton.jit
def store_parameters(dparameters, total, product, invstd, c, mask):
    """dweight and dbias of channels c, where wanted."""
    if dparameters[0] is not None:
        value = tl.cast(product * invstd, dparameters[0].dtype.element_ty)
        tl.store(dparameters[0] + c, value, mask=mask)
    if dparameters[1] is not None:
        tl.store(dparameters[1] + c, tl.cast(total, dparameters[1].dtype.element_ty), mask=mask)


@triton.jit
def store_gradients(
    g, x, p_dx, p_dresidual, n, n_end, row, k, m_column, vectors, projection,
    R: tl.constexpr, K: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr, RAGGED: tl.constexpr,
    MASKED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes dx and dresidual of one tile. projection: per column (sum(g) / M, invstd**2 * sum(g*(x-mean)) / M),
    or None for running statistics."""
    offsets = tile_offsets(n, row, k, R, VECTOR, WIDE)
    if RAGGED:
        mask = tile_mask(n, n_end, m_column, R, K)
    else:
        mask = tl.broadcast_to(m_column[None, :], (R, K))
    if p_dresidual is not None:
        store(p_dresidual, offsets, g, mask, RAGGED or MASKED, "evict_first")
    if p_dx is not None:
        dx = g.to(ACC)
        if projection is not None:
            dx = tl.fma(vectors[0] - x.to(ACC), projection[1], dx - projection[0])
        store(p_dx, offsets, dx * vectors[1], mask, RAGGED or MASKED, "evict_first")


@triton.jit
def backward_reduce_kernel(
    p_dy, p_x, p_residual, p_bits, affine, p_stats, p_partials, sizes, strides, rows, splits, blocks,
    R: tl.constexpr, K: tl.constexpr, U: tl.constexpr, G: tl.constexpr, KIND: tl.constexpr,
    PARAMETER: tl.constexpr, ACC: tl.constexpr, EACH: tl.constexpr, DENSE: tl.constexpr,
    VECTOR: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Partial sum(g) and sum(g * (x - mean)) of the channels in a block of columns and a range of rows.

    p_partials: [2, splits * blocks, C], as in :func:`triton_bn.kernels.moments.moments_kernel`.
    """
    row = sizes[1] * sizes[2]
    n_blocks = tl.cdiv(row, K)
    pid = tl.program_id(0)
    i_block = pid % n_blocks
    i_split = pid // n_blocks
    if WIDE:
        i_block = i_block.to(tl.int64)
    begin = i_block * K
    k, c, o_x, m_column = tile_columns(begin, row, sizes, strides, K, DENSE)
    _, vectors = load_statistics(p_stats, affine, c, sizes[1], m_column, ACC)
    n_begin = i_split * rows
    n_end = tl.minimum(n_begin + rows, sizes[0])
    n_ragged = n_begin + tl.maximum(n_end - n_begin, 0) // (R * U) * (R * U)
    total = tl.zeros((R, K), ACC)
    product = tl.zeros((R, K), ACC)
    for n in range(n_begin, n_ragged, R * U):
        x = load_chunk(
            p_x, n, n_end, strides[0], o_x, m_column,
            R, K, U, VECTOR, WIDE, False, MASKED, "evict_last",
        )  # fmt: skip
        dy = load_chunk(
            p_dy, n, n_end, row, k, m_column, R, K, U, VECTOR, WIDE, False, MASKED, "evict_last"
        )
        for u in tl.static_range(U):
            g = gradient_tile(
                dy[u], x[u], p_residual, p_bits, n + u * R, n_end, row, begin, row, k, m_column, vectors,
                R, K, VECTOR, WIDE, False, MASKED, KIND, PARAMETER, ACC,
            ).to(ACC)  # fmt: skip
            total += g
            product += g * (x[u].to(ACC) - vectors[0])
    for n in range(n_ragged, n_end, R):
        x = load_chunk(
            p_x, n, n_end, strides[0], o_x, m_column,
            R, K, 1, VECTOR, WIDE, True, MASKED, "evict_last",
        )  # fmt: skip
        dy = load_chunk(
            p_dy, n, n_end, row, k, m_column, R, K, 1, VECTOR, WIDE, True, MASKED, "evict_last"
        )
        g = gradient_tile(
            dy[0], x[0], p_residual, p_bits, n, n_end, row, begin, row, k, m_column, vectors,
            R, K, VECTOR, WIDE, True, MASKED, KIND, PARAMETER, ACC,
        ).to(ACC)  # fmt: skip
        total += g
        product += g * (x[0].to(ACC) - vectors[0])

    first = begin // sizes[2]
    channel = first + tl.arange(0, G)
    low = tl.maximum(begin, channel * sizes[2])
    mask = (low < tl.minimum(begin + K, (channel + 1) * sizes[2])) & (channel < sizes[1])
    q = i_split * blocks + i_block - channel * sizes[2] // K
    o = q * sizes[1] + channel
    total = fold_sums(tl.sum(total, 0), c, first, m_column, G, EACH)
    product = fold_sums(tl.sum(product, 0), c, first, m_column, G, EACH)
    tl.store(p_partials + o, total, mask=mask)
    tl.store(p_partials + splits * blocks * sizes[1] + o, product, mask=mask)


@triton.jit
def backward_apply_kernel(
    p_dy, p_x, p_residual, p_bits, affine, p_stats, p_partials, p_dx, p_dresidual, dparameters, count,
    sizes, strides, rows, partial_rows, splits, blocks,
    R: tl.constexpr, K: tl.constexpr, U: tl.constexpr, G: tl.constexpr, Q: tl.constexpr,
    K_PARTIAL: tl.constexpr, TRAINING: tl.constexpr, KIND: tl.constexpr, PARAMETER: tl.constexpr,
    ACC: tl.constexpr, EACH: tl.constexpr, DENSE: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """dx, dresidual, dweight and dbias (each where wanted) from the merged sums over ``count`` values a channel.

    Without TRAINING no sums enter dx; without p_partials none are merged, and p_x may be None.
    """
    row = sizes[1] * sizes[2]
    n_blocks = tl.cdiv(row, K)
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    i_block = pid % n_blocks
    i_split = pid // n_blocks
    if WIDE:
        i_block = i_block.to(tl.int64)
    begin = i_block * K
    k, c, o_x, m_column = tile_columns(begin, row, sizes, strides, K, DENSE)
    invstd, vectors = load_statistics(p_stats, affine, c, sizes[1], m_column, ACC)
    projection = None
    if p_partials is not None:
        first = begin // sizes[2]
        channel = first + tl.arange(0, G)
        total, product = merge_sums(
            p_partials, channel, sizes, partial_rows, splits, blocks, K_PARTIAL, G, Q, ACC
        )
        owner = (channel * sizes[2] // K == pid) & (channel < sizes[1])
        own_invstd = load_channel(p_stats + sizes[1], channel, owner, 0.0, ACC)
        store_parameters(dparameters, total, product, own_invstd, channel, owner)
        if TRAINING:
            m = tl.cast(count, ACC)
            total = spread(total / m, c, first, G, EACH)
            product = spread(product / m, c, first, G, EACH) * invstd * invstd
            projection = (total[None, :], product[None, :])
    if p_dx is not None or p_dresidual is not None:
        n_begin = i_split * rows
        n_end = tl.minimum(n_begin + rows, sizes[0])
        n_ragged = n_begin + tl.maximum(n_end - n_begin, 0) // (R * U) * (R * U)
        for n in range(n_begin, n_ragged, R * U):
            dy = load_chunk(
                p_dy, n, n_end, row, k, m_column, R, K, U, VECTOR, WIDE, False, MASKED, "evict_first"
            )
            x = dy
            if p_x is not None:
                x = load_chunk(
                    p_x, n, n_end, strides[0], o_x, m_column,
                    R, K, U, VECTOR, WIDE, False, MASKED, "evict_first",
                )  # fmt: skip
            for u in tl.static_range(U):
                g = gradient_tile(
                    dy[u], x[u], p_residual, p_bits, n + u * R, n_end, row, begin, row, k, m_column,
                    vectors, R, K, VECTOR, WIDE, False, MASKED, KIND, PARAMETER, ACC,
                )  # fmt: skip
                store_gradients(
                    g, x[u], p_dx, p_dresidual, n + u * R, n_end, row, k, m_column, vectors, projection,
                    R, K, VECTOR, WIDE, False, MASKED, ACC,
                )  # fmt: skip
        for n in range(n_ragged, n_end, R):
            dy = load_chunk(
                p_dy, n, n_end, row, k, m_column, R, K, 1, VECTOR, WIDE, True, MASKED, "evict_first"
            )
            x = dy
            if p_x is not None:
                x = load_chunk(
                    p_x, n, n_end, strides[0], o_x, m_column,
                    R, K, 1, VECTOR, WIDE, True, MASKED, "evict_first",
                )  # fmt: skip
            g = gradient_tile(
                dy[0], x[0], p_residual, p_bits, n, n_end, row, begin, row, k, m_column, vectors,
                R, K, VECTOR, WIDE, True, MASKED, KIND, PARAMETER, ACC,
            )  # fmt: skip
            store_gradients(
                g, x[0], p_dx, p_dresidual, n, n_end, row, k, m_column, vectors, projection,
                R, K, VECTOR, WIDE, True, MASKED, ACC,
            )  # fmt: skip


@triton.jit
def backward_kernel(
    p_dy, p_x, p_residual, p_bits, affine, p_stats, p_dx, p_dresidual, dparameters, sizes, strides,
    INNER: tl.constexpr, CHANNELS: tl.constexpr, R: tl.constexpr, K: tl.constexpr, U: tl.constexpr,
    G: tl.constexpr, TRAINING: tl.constexpr, KIND: tl.constexpr, PARAMETER: tl.constexpr,
    ACC: tl.constexpr, EACH: tl.constexpr, DENSE: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
    RAGGED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """All gradients in one read: a program holds x and dy of CHANNELS whole channels in registers."""
    row = sizes[1] * INNER
    first = tl.program_id(0) * CHANNELS
    begin = tl.program_id(0) * (CHANNELS * INNER)
    if WIDE:
        begin = begin.to(tl.int64)
    end = tl.minimum(begin + CHANNELS * INNER, row)
    k, c, o_x, m_column = tile_columns(begin, end, (sizes[0], sizes[1], INNER), strides, K, DENSE)
    invstd, vectors = load_statistics(p_stats, affine, c, sizes[1], m_column, ACC)
    x = load_chunk(
        p_x, 0, sizes[0], strides[0], o_x, m_column, R, K, U, VECTOR, WIDE, RAGGED, MASKED, "evict_first"
    )
    dy = load_chunk(
        p_dy, 0, sizes[0], row, k, m_column, R, K, U, VECTOR, WIDE, RAGGED, MASKED, "evict_first"
    )
    total = tl.zeros((R, K), ACC)
    product = tl.zeros((R, K), ACC)
    g = ()
    for u in tl.static_range(U):
        tile = gradient_tile(
            dy[u], x[u], p_residual, p_bits, u * R, sizes[0], row, begin, end, k, m_column, vectors,
            R, K, VECTOR, WIDE, RAGGED, MASKED, KIND, PARAMETER, ACC,
        )  # fmt: skip
        total += tile.to(ACC)
        product += tile.to(ACC) * (x[u].to(ACC) - vectors[0])
        g = g + (tile,)
    total = fold_sums(tl.sum(total, 0), c, first, m_column, G, EACH)
    product = fold_sums(tl.sum(product, 0), c, first, m_column, G, EACH)
    channel = first + tl.arange(0, G)
    mask = (tl.arange(0, G) < CHANNELS) & (channel < sizes[1])
    own_invstd = load_channel(p_stats + sizes[1], channel, mask, 0.0, ACC)
    store_parameters(dparameters, total, product, own_invstd, channel, mask)
    projection = None
    if TRAINING:
        m = tl.cast(sizes[0] * INNER, ACC)
        mean_g = spread(total / m, c, first, G, EACH)
        slope_g = spread(product / m, c, first, G, EACH) * invstd * invstd
        projection = (mean_g[None, :], slope_g[None, :])
    for u in tl.static_range(U):
        store_gradients(
            g[u], x[u], p_dx, p_dresidual, u * R, sizes[0], row, k, m_column, vectors, projection,
            R, K, VECTOR, WIDE, RAGGED, MASKED, ACC,
        )  # fmt: skip
