"""(count, mean, M2) of every channel: Chan, Golub and LeVeque, "Updating formulae ..." (1979).

A *slot* is a place in a tile: it sees every R-th row of one column. A chunk of up to U tiles gives each
slot a (count, mean, M2) from sums of x - x0 and (x - x0)**2, where x0 is the slot's first value of that
very chunk. As x0 is one of the chunk's values, (x0 - mean)**2 <= (U - 1) * variance (Samuelson's
inequality), so the subtraction M2 = sum d**2 - (sum d)**2 / U cannot cancel more than a factor U,
whatever the data; and it costs three instructions a value, without a division. Slots, then columns, then
programs are merged by Chan's rule in an order that the shapes alone decide: the same bits on every run.
"""

import triton
import triton.language as tl

from triton_bn.kernels.tile import load, members, tile_columns, tile_mask, tile_offsets


@triton.jit
def merge(count_a, mean_a, m2_a, count_b, mean_b, m2_b):
    """Chan's rule for two sets, elementwise. Either may be empty."""
    count = count_a + count_b
    share = count_b / tl.maximum(count, 1)
    delta = mean_b - mean_a
    return count, mean_a + delta * share, m2_a + m2_b + delta * delta * count_a * share


@triton.jit
def merge_axis(count, mean, m2, axis: tl.constexpr):
    """Chan's rule for all the sets along an axis: M2 = sum(M2_i + count_i * (mean_i - mean)**2)."""
    total = tl.sum(count, axis)
    centre = tl.sum(count * mean, axis) / tl.maximum(total, 1)
    delta = mean - tl.expand_dims(centre, axis)
    return total, centre, tl.sum(m2 + count * delta * delta, axis)


@triton.jit
def chunk_moments(
    tiles, n, n_end, R: tl.constexpr, U: tl.constexpr, RAGGED: tl.constexpr, ACC: tl.constexpr
):
    """(count [R, 1], mean [R, K], M2 [R, K]) of the slots of U tiles; RAGGED: rows may end before n_end."""
    origin = tiles[0].to(ACC)
    total = tl.zeros_like(origin)
    square = tl.zeros_like(origin)
    i_row = n + tl.arange(0, R)[:, None]
    if RAGGED:
        count = tl.minimum(tl.maximum((n_end - i_row + R - 1) // R, 0), U).to(ACC)
    else:
        count = tl.full((R, 1), U, ACC)
    for u in tl.static_range(1, U):
        d = tiles[u].to(ACC) - origin
        if RAGGED:
            d = tl.where(i_row + u * R < n_end, d, 0)
        total += d
        square += d * d
    mean = total / tl.maximum(count, 1)
    m2 = square - total * mean
    return count, origin + mean, tl.where(m2 < 0, 0, m2)


@triton.jit
def load_chunk(
    p, n, n_end, stride, o_column, m_column,
    R: tl.constexpr, K: tl.constexpr, U: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr,
    RAGGED: tl.constexpr, MASKED: tl.constexpr, POLICY: tl.constexpr,
):  # fmt: skip
    """U tiles below one another, all in flight together. RAGGED: rows may end; MASKED: so may columns."""
    tiles = ()
    for u in tl.static_range(U):
        offsets = tile_offsets(n + u * R, stride, o_column, R, VECTOR, WIDE)
        if RAGGED:
            mask = tile_mask(n + u * R, n_end, m_column, R, K)
        else:
            mask = tl.broadcast_to(m_column[None, :], (R, K))
        tiles = tiles + (load(p, offsets, mask, RAGGED or MASKED, POLICY),)
    return tiles


@triton.jit
def fold_moments(
    count, mean, m2, c, first, m_column, G: tl.constexpr, EACH: tl.constexpr
):
    """[K] moments of columns → [G] moments of channels first + g."""
    count = tl.where(m_column, count, 0)
    if EACH:
        return count, mean, m2
    else:
        member = members(c, first, m_column, G)
        return merge_axis(
            tl.where(member, count[None, :], 0),
            tl.where(member, mean[None, :], 0),
            tl.where(member, m2[None, :], 0),
            1,
        )


@triton.jit
def partial_shares(
    q, c, sizes, rows, blocks, K: tl.constexpr
):
    """[Q, G]: how many values of channels c lie in partial q, the one of split q // blocks.

    The columns are cut into blocks of K; a channel's blocks are numbered from the first that touches it.
    """
    n = tl.minimum(tl.maximum(sizes[0] - (q // blocks) * rows, 0), rows)
    begin = c * sizes[2]
    block = (begin // K)[None, :] + (q % blocks)[:, None]
    low = tl.maximum(block * K, begin[None, :])
    high = tl.minimum((block + 1) * K, (begin + sizes[2])[None, :])
    return n[:, None] * tl.maximum(high - low, 0)


@triton.jit
def merge_partials(
    p_partials, c, sizes, rows, splits, blocks,
    K: tl.constexpr, G: tl.constexpr, Q: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The moments of channels c [G] from all their partials, Q at a time: (count, mean, M2)."""
    count = tl.zeros((G,), ACC)
    mean = tl.zeros((G,), ACC)
    m2 = tl.zeros((G,), ACC)
    last = splits * blocks
    for start in range(0, last, Q):
        q = start + tl.arange(0, Q)
        share = partial_shares(q, c, sizes, rows, blocks, K)
        mask = (share > 0) & (q < last)[:, None] & (c < sizes[1])[None, :]
        o = q[:, None] * sizes[1] + c[None, :]
        part_mean = tl.load(p_partials + o, mask=mask, other=0.0)
        part_m2 = tl.load(p_partials + last * sizes[1] + o, mask=mask, other=0.0)
        part = merge_axis(tl.where(mask, share, 0).to(ACC), part_mean, part_m2, 0)
        count, mean, m2 = merge(count, mean, m2, part[0], part[1], part[2])
    return count, mean, m2


@triton.jit
def moments_kernel(
    p_x, p_partials, p_tracked, sizes, strides, rows, splits, blocks,
    R: tl.constexpr, K: tl.constexpr, U: tl.constexpr, G: tl.constexpr, ACC: tl.constexpr,
    EACH: tl.constexpr, DENSE: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Partial (mean, M2) of the channels in a block of columns and a range of ``rows`` rows.

    p_partials: [2, splits * blocks, C]. The counts follow from the geometry (:func:`partial_shares`).
    """
    row = sizes[1] * sizes[2]
    n_blocks = tl.cdiv(row, K)
    pid = tl.program_id(0)
    i_block = pid % n_blocks
    i_split = pid // n_blocks
    if p_tracked is not None:
        if pid == 0:
            tl.store(p_tracked, tl.load(p_tracked) + 1)
    if WIDE:
        i_block = i_block.to(tl.int64)

    k, c, o_x, m_column = tile_columns(i_block * K, row, sizes, strides, K, DENSE)
    n_begin = i_split * rows
    n_end = tl.minimum(n_begin + rows, sizes[0])
    n_ragged = n_begin + tl.maximum(n_end - n_begin, 0) // (R * U) * (R * U)
    count = tl.zeros((R, 1), ACC)
    mean = tl.zeros((R, K), ACC)
    m2 = tl.zeros((R, K), ACC)
    for n in range(n_begin, n_ragged, R * U):
        tiles = load_chunk(
            p_x, n, n_end, strides[0], o_x, m_column,
            R, K, U, VECTOR, WIDE, False, MASKED, "evict_last",
        )  # fmt: skip
        part = chunk_moments(tiles, n, n_end, R, U, False, ACC)
        count, mean, m2 = merge(count, mean, m2, part[0], part[1], part[2])
    if n_ragged < n_end:
        tiles = load_chunk(
            p_x, n_ragged, n_end, strides[0], o_x, m_column,
            R, K, U, VECTOR, WIDE, True, MASKED, "evict_last",
        )  # fmt: skip
        part = chunk_moments(tiles, n_ragged, n_end, R, U, True, ACC)
        count, mean, m2 = merge(count, mean, m2, part[0], part[1], part[2])

    first = i_block * K // sizes[2]
    count, mean, m2 = merge_axis(count, mean, m2, 0)
    count, mean, m2 = fold_moments(count, mean, m2, c, first, m_column, G, EACH)
    channel = first + tl.arange(0, G)
    q = i_split * blocks + i_block - channel * sizes[2] // K
    o = q * sizes[1] + channel
    tl.store(p_partials + o, mean, mask=count > 0)
    tl.store(p_partials + splits * blocks * sizes[1] + o, m2, mask=count > 0)
