"""The transform, alone (:func:`normalize_kernel`) and with the moments (:func:`forward_kernel`)."""

import triton
import triton.language as tl

from triton_bn.kernels.activation import activate, steep
from triton_bn.kernels.moments import (
    chunk_moments,
    fold_moments,
    load_chunk,
    merge_axis,
    merge_partials,
)
from triton_bn.kernels.tile import (
    double,
    load,
    load_channel,
    spread,
    store,
    tile_columns,
    tile_mask,
    tile_offsets,
)


@triton.jit
def preactivation(x, mean, scale, bias, residual):
    """z = (x - mean) * scale + bias + residual.

    Centred first: x * scale + (bias - mean * scale) would save an addition and lose the digits
    that x and mean share. Forward and backward call this very function, so that both see the same z.
    """
    z = tl.fma(x - mean, scale, bias)
    if residual is None:
        return z
    else:
        return z + residual


@triton.jit
def pack_bits(bit, R: tl.constexpr, K: tl.constexpr):
    """[R, K] booleans → [R, K // 8] bytes, lowest bit first."""
    weighted = tl.reshape(bit.to(tl.int32), (R, K // 8, 8)) << tl.arange(0, 8)[None, None, :]
    return tl.sum(weighted, 2).to(tl.uint8)


@triton.jit
def column_vectors(mean, invstd, affine, c, m_column, ACC: tl.constexpr):
    """What the transform of each column needs: (mean, scale, bias), each [1, K]."""
    scale = invstd * load_channel(affine[0], c, m_column, 1.0, ACC)
    bias = load_channel(affine[1], c, m_column, 0.0, ACC)
    return mean[None, :], scale[None, :], bias[None, :]


@triton.jit
def transform_tile(
    x, p_y, p_residual, p_bits, n, n_end, row, begin, end, k, m_column, vectors,
    R: tl.constexpr, K: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr, RAGGED: tl.constexpr,
    MASKED: tl.constexpr, KIND: tl.constexpr, PARAMETER: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes activation(z) of one [R, K] tile, and where p_bits is given, whether its slope is 1."""
    o_y = tile_offsets(n, row, k, R, VECTOR, WIDE)
    if RAGGED:
        mask = tile_mask(n, n_end, m_column, R, K)
    else:
        mask = tl.broadcast_to(m_column[None, :], (R, K))
    if p_residual is None:
        residual = None
    else:
        residual = load(p_residual, o_y, mask, RAGGED or MASKED, "evict_first").to(ACC)
    z = preactivation(x.to(ACC), vectors[0], vectors[1], vectors[2], residual)
    store(p_y, o_y, activate(z, KIND, PARAMETER), mask, RAGGED or MASKED, "evict_first")
    if p_bits is not None:
        # A row's bits start on a byte of their own, and so do a tile's: begin is a multiple of 8.
        pitch = (row + 7) // 8
        byte = begin // 8 + tl.arange(0, K // 8)
        o_bits = tile_offsets(n, pitch, byte, R, 1, WIDE)
        m_bits = tile_mask(n, n_end, byte * 8 < end, R, K // 8)
        bit = steep(z, KIND) & m_column[None, :]
        tl.store(p_bits + o_bits, pack_bits(bit, R, K), mask=m_bits)


@triton.jit
def publish(
    p_stats, running, momentum, count, mean, m2, invstd, c, m_owner, channels,
    CUMULATIVE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Stores the statistics of channels c for backward, and advances the running ones.

    running = (1 - f) * running + f * batch, with the unbiased variance; f is the momentum, or
    1 / num_batches_tracked (advanced by an earlier launch) for the cumulative average.
    """
    tl.store(p_stats + c, mean, mask=m_owner)
    tl.store(p_stats + channels + c, invstd, mask=m_owner)
    if running[0] is not None:
        if CUMULATIVE:
            factor = 1 / tl.load(running[2]).to(ACC)
        else:
            factor = double(momentum, ACC)
        old_mean = tl.load(running[0] + c, mask=m_owner, other=0.0).to(ACC)
        old_var = tl.load(running[1] + c, mask=m_owner, other=0.0).to(ACC)
        new_mean = (1 - factor) * old_mean + factor * mean
        new_var = (1 - factor) * old_var + factor * (m2 / (count - 1))
        tl.store(running[0] + c, tl.cast(new_mean, running[0].dtype.element_ty), mask=m_owner)
        tl.store(running[1] + c, tl.cast(new_var, running[1].dtype.element_ty), mask=m_owner)


@triton.jit
def normalize_kernel(
    p_x, p_y, p_residual, p_bits, affine, p_stats, p_partials, running, momentum, eps,
    sizes, strides, rows, partial_rows, splits, blocks,
    R: tl.constexpr, K: tl.constexpr, U: tl.constexpr, G: tl.constexpr, Q: tl.constexpr,
    K_PARTIAL: tl.constexpr, KIND: tl.constexpr, PARAMETER: tl.constexpr, CUMULATIVE: tl.constexpr,
    ACC: tl.constexpr, EACH: tl.constexpr, DENSE: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """y = activation((x - mean) * invstd * weight + bias + residual) over a block of columns and rows.

    With p_partials (of :func:`moments_kernel`) every program merges those of its channels first, and the
    first to touch a channel publishes its statistics. Without, mean and variance are given: ``running``.
    """
    row = sizes[1] * sizes[2]
    n_blocks = tl.cdiv(row, K)
    # Backwards: what the moments read last is still in L2.
    pid = tl.num_programs(0) - 1 - tl.program_id(0)
    i_block = pid % n_blocks
    i_split = pid // n_blocks
    if WIDE:
        i_block = i_block.to(tl.int64)
    begin = i_block * K
    k, c, o_x, m_column = tile_columns(begin, row, sizes, strides, K, DENSE)
    first = begin // sizes[2]
    channel = first + tl.arange(0, G)
    owner = (channel * sizes[2] // K == pid) & (channel < sizes[1])
    if p_partials is None:
        mask = channel < sizes[1]
        mean = tl.load(running[0] + channel, mask=mask, other=0.0).to(ACC)
        variance = tl.load(running[1] + channel, mask=mask, other=0.0).to(ACC)
        invstd = tl.rsqrt(variance + double(eps, ACC))
        tl.store(p_stats + channel, mean, mask=owner)
        tl.store(p_stats + sizes[1] + channel, invstd, mask=owner)
    else:
        count, mean, m2 = merge_partials(
            p_partials, channel, sizes, partial_rows, splits, blocks, K_PARTIAL, G, Q, ACC
        )
        invstd = tl.rsqrt(m2 / tl.maximum(count, 1) + double(eps, ACC))
        publish(
            p_stats, running, momentum, count, mean, m2, invstd, channel, owner, sizes[1],
            CUMULATIVE, ACC,
        )  # fmt: skip
    vectors = column_vectors(
        spread(mean, c, first, G, EACH), spread(invstd, c, first, G, EACH), affine, c, m_column, ACC
    )
    n_begin = i_split * rows
    n_end = tl.minimum(n_begin + rows, sizes[0])
    n_ragged = n_begin + tl.maximum(n_end - n_begin, 0) // (R * U) * (R * U)
    for n in range(n_begin, n_ragged, R * U):
        tiles = load_chunk(
            p_x, n, n_end, strides[0], o_x, m_column,
            R, K, U, VECTOR, WIDE, False, MASKED, "evict_first",
        )  # fmt: skip
        for u in tl.static_range(U):
            transform_tile(
                tiles[u], p_y, p_residual, p_bits, n + u * R, n_end, row, begin, row, k, m_column, vectors,
                R, K, VECTOR, WIDE, False, MASKED, KIND, PARAMETER, ACC,
            )  # fmt: skip
    for n in range(n_ragged, n_end, R):
        tiles = load_chunk(
            p_x, n, n_end, strides[0], o_x, m_column,
            R, K, 1, VECTOR, WIDE, True, MASKED, "evict_first",
        )  # fmt: skip
        transform_tile(
            tiles[0], p_y, p_residual, p_bits, n, n_end, row, begin, row, k, m_column, vectors,
            R, K, VECTOR, WIDE, True, MASKED, KIND, PARAMETER, ACC,
        )  # fmt: skip


@triton.jit
def forward_kernel(
    p_x, p_y, p_residual, p_bits, affine, p_stats, running, momentum, eps, sizes, strides,
    INNER: tl.constexpr, CHANNELS: tl.constexpr, R: tl.constexpr, K: tl.constexpr, U: tl.constexpr,
    G: tl.constexpr, KIND: tl.constexpr, PARAMETER: tl.constexpr, ACC: tl.constexpr, EACH: tl.constexpr,
    DENSE: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr, RAGGED: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Training in one read: a program holds CHANNELS whole channels, U tiles of R rows, in registers.

    INNER is S, as a constant, so that the compiler sees where 16-byte accesses may start.
    """
    row = sizes[1] * INNER
    first = tl.program_id(0) * CHANNELS
    if running[2] is not None:
        if first == 0:
            tl.store(running[2], tl.load(running[2]) + 1)
    begin = tl.program_id(0) * (CHANNELS * INNER)
    if WIDE:
        begin = begin.to(tl.int64)
    end = tl.minimum(begin + CHANNELS * INNER, row)
    k, c, o_x, m_column = tile_columns(begin, end, (sizes[0], sizes[1], INNER), strides, K, DENSE)
    tiles = load_chunk(
        p_x, 0, sizes[0], strides[0], o_x, m_column, R, K, U, VECTOR, WIDE, RAGGED, MASKED, "evict_first"
    )
    count, mean, m2 = chunk_moments(tiles, 0, sizes[0], R, U, RAGGED, ACC)
    count, mean, m2 = merge_axis(count, mean, m2, 0)
    count, mean, m2 = fold_moments(count, mean, m2, c, first, m_column, G, EACH)
    invstd = tl.rsqrt(m2 / tl.maximum(count, 1) + double(eps, ACC))
    channel = first + tl.arange(0, G)
    publish(
        p_stats, running, momentum, count, mean, m2, invstd, channel, count > 0, sizes[1], False, ACC
    )
    vectors = column_vectors(
        spread(mean, c, first, G, EACH), spread(invstd, c, first, G, EACH), affine, c, m_column, ACC
    )
    for u in tl.static_range(U):
        transform_tile(
            tiles[u], p_y, p_residual, p_bits, u * R, sizes[0], row, begin, end, k, m_column, vectors,
            R, K, VECTOR, WIDE, RAGGED, MASKED, KIND, PARAMETER, ACC,
        )  # fmt: skip
