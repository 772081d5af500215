"""(count, mean, M2) of every channel: Chan, Golub and LeVeque, "Updating formulae ..." (1979).

A *slot* is a place in a tile: it sees every R-th row of one column. A chunk of up to U tiles gives each
slot a (count, mean, M2) from sums of x - x0 and (x - x0)**2, where x0 is the slot's first value of that
very chunk. As x0 is one of the chunk's values, (x0 - mean)**2 <= (U - 1) * variance (Samuelson's
inequality), so the subtraction M2 = sum d**2 - (sum d)**2 / U cannot cancel more than a factor U,
whatever the data; and it costs three instructions a value, without a division. Slots, then columns, then
programs are merged by Chan's rule in an order that the shapes alone decide: the same bits on every run.
Until the last merge all means of a channel are kept relative to its first value (:func:`load_base`).
A program that holds whole channels has no need of slots: it takes the mean, and then the deviations from it
(:func:`held_moments`).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from triton_bn.kernels.tile import (
    fold_sums,
    how_many,
    index,
    load_chunk,
    load_columns,
    load_takes,
    members,
    row_length,
    row_range,
    select,
    spread,
    tile_columns,
    touched,
)


class Moments(NamedTuple):
    """How many values, their mean, and the sum of their squared deviations from it."""

    count: Any
    mean: Any
    m2: Any


@triton.jit
def finite(v):
    """v, and 0 where it is infinite or NaN: such a value is nothing to be relative to."""
    return tl.where(tl.abs(v) < float("inf"), v, 0)


@triton.jit
def merge(a, b):
    """Chan's rule for two sets, elementwise. Either may be empty, or its mean infinite: no a.mean + delta * share."""
    count = a.count + b.count
    share = b.count / tl.maximum(count, 1)
    delta = b.mean - a.mean
    mean = a.mean * (1 - share) + b.mean * share
    return Moments(count, mean, a.m2 + b.m2 + delta * (a.count * share) * delta)


@triton.jit
def merge_axis(a, axis: tl.constexpr):
    """Chan's rule for all the sets along an axis: M2 = sum(M2_i + count_i * (mean_i - mean)**2)."""
    count = tl.sum(a.count, axis)
    mean = tl.sum(a.count * a.mean, axis) / tl.maximum(count, 1)
    delta = a.mean - tl.expand_dims(mean, axis)
    # What the roundings of that sum took from the mean.
    rest = finite(tl.sum(a.count * delta, axis) / tl.maximum(count, 1))
    delta -= tl.expand_dims(rest, axis)
    return Moments(count, mean + rest, tl.sum(a.m2 + a.count * delta * delta, axis))


@triton.jit
def less(square, share):
    """square - share >= 0. A variance that the dtype cannot hold is infinite, not inf - inf."""
    m2 = square - share
    return tl.where(square == float("inf"), square, tl.where(m2 < 0, 0, m2))


@triton.jit
def taking_moments(tiles, takes, base, T: tl.constexpr):
    """:func:`chunk_moments` of what takes part: count [R, K], or [R, 1]. x0 is a slot's first such value."""
    DEPTH: tl.constexpr = T.U
    zero = tl.full((T.R, T.K), 0.0, tl.dtype(T.ACC))
    count = takes[0].to(tl.dtype(T.ACC))
    origin = tl.where(takes[DEPTH - 1], tiles[DEPTH - 1].to(tl.dtype(T.ACC)), zero)
    for u in tl.static_range(1, DEPTH):
        count += takes[u].to(tl.dtype(T.ACC))
        earlier = tiles[DEPTH - 1 - u].to(tl.dtype(T.ACC))
        origin = tl.where(takes[DEPTH - 1 - u], earlier, origin)
    origin = finite(origin)
    total, square = zero, zero
    for u in tl.static_range(DEPTH):
        d = select(takes, u, tiles[u].to(tl.dtype(T.ACC)) - origin)
        total += d
        square += d * d
    mean = total / tl.maximum(count, 1)
    return Moments(count, tl.where(count > 0, origin - base + mean, 0), less(square, total * mean))


@triton.jit
def chunk_moments(tiles, base, n, n_end, RAGGED: tl.constexpr, T: tl.constexpr):
    """Moments of the slots of U tiles: count [R, 1], mean - base and M2 [R, K]. RAGGED: rows end at n_end."""
    DEPTH: tl.constexpr = T.U
    first = tiles[0].to(tl.dtype(T.ACC))
    origin = finite(first)
    total = first - origin
    square = tl.full((T.R, T.K), 0.0, tl.dtype(T.ACC))
    i_row = n + tl.arange(0, T.R)[:, None]
    if RAGGED:
        count = tl.minimum(tl.maximum((n_end - i_row + T.R - 1) // T.R, 0), T.U).to(tl.dtype(T.ACC))
    else:
        count = tl.full((T.R, 1), T.U, tl.dtype(T.ACC))
    for u in tl.static_range(1, DEPTH):
        d = tiles[u].to(tl.dtype(T.ACC)) - origin
        if RAGGED:
            d = tl.where(i_row + u * T.R < n_end, d, 0)
        total += d
        square += d * d
    mean = total / tl.maximum(count, 1)
    m2 = tl.maximum(square - total * mean, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return Moments(count, origin - base + mean, m2)


@triton.jit
def slot_moments(tiles, takes, base, n, n_end, RAGGED: tl.constexpr, T: tl.constexpr):
    """Moments of the slots of U tiles: of what takes part, or without a mask of all."""
    if len(takes) == 0:
        return chunk_moments(tiles, base, n, n_end, RAGGED, T)
    else:
        return taking_moments(tiles, takes, base, T)


@triton.jit
def base_place(p_x, taking, inner, strides):
    """Channel 0's first value, or the first that takes part: the bases of all channels lie at its place."""
    if taking[1] is None:
        return p_x
    else:
        place = tl.load(taking[1] + 1)
        return p_x + place // inner * strides[0] + place % inner * strides[2]


@triton.jit
def load_base(p_x, channel, strides, mask, T: tl.constexpr):
    """The first value of each channel: what all its means are relative to until they are one.

    Rounded to float32 as they are, the means of two parts of a channel would lose their difference.
    """
    o = index(channel, T) * strides[1]
    return finite(tl.load(p_x + o, mask=mask, other=0.0).to(tl.dtype(T.ACC)))


@triton.jit
def fold_moments(a, columns, T: tl.constexpr):
    """Moments of slots [R, K] → of channels first + [0, G)."""
    a = merge_axis(a, 0)
    count = tl.where(columns.mask, a.count, 0)
    if T.EACH:
        return Moments(count, a.mean, a.m2)
    else:
        member = members(columns, T.G)
        return merge_axis(
            Moments(
                tl.where(member, count[None, :], 0),
                tl.where(member, a.mean[None, :], 0),
                tl.where(member, a.m2[None, :], 0),
            ),
            1,
        )


@triton.jit
def held_moments(tiles, takes, taking, p_x, columns, channel, sizes, strides, T: tl.constexpr):
    """Moments of whole channels [G], all of whose values are in U tiles: two passes over registers.

    The deviations are from the mean as it was rounded; their own mean is what that took.
    """
    DEPTH: tl.constexpr = T.U
    i_row = tl.arange(0, T.R)[:, None]
    zero = tl.full((T.R, T.K), 0.0, tl.dtype(T.ACC))
    count = tl.cast(how_many(taking, sizes[0] * T.INNER), tl.dtype(T.ACC))
    p_x = base_place(p_x, taking, T.INNER, strides)
    base = finite(load_columns(p_x, strides[1], columns, 0.0, T))
    total = zero
    for u in tl.static_range(DEPTH):
        d = select(takes, u, tiles[u].to(tl.dtype(T.ACC)) - base)
        total += tl.where(i_row + u * T.R < sizes[0], d, 0) if u >= T.WHOLE else d
    mean = load_base(p_x, channel, strides, channel < sizes[1], T)
    mean += fold_sums(total, columns, T) / count
    center = spread(mean, columns, T)
    total, square = zero, zero
    for u in tl.static_range(DEPTH):
        d = select(takes, u, tiles[u].to(tl.dtype(T.ACC)) - center)
        d = tl.where(i_row + u * T.R < sizes[0], d, 0) if u >= T.WHOLE else d
        total += d
        square += d * d
    square = fold_sums(square, columns, T)  # about an infinite mean they are NaN
    rest = finite(fold_sums(total, columns, T) / count)
    return Moments(count, mean + rest, less(square, count * rest * rest))


@triton.jit
def partial_shares(q, channel, sizes, partial, T: tl.constexpr):
    """[Q, G]: how many values of each channel lie in partial q: that of split q // blocks.

    The columns are cut into blocks of K_PARTIAL; a channel's blocks are numbered from the first that
    touches it. ``partial`` is (rows a split, splits, blocks a channel).
    """
    n = tl.minimum(tl.maximum(sizes[0] - (q // partial[2]) * partial[0], 0), partial[0])
    begin = channel * sizes[2]
    block = (begin // T.K_PARTIAL)[None, :] + (q % partial[2])[:, None]
    low = tl.maximum(block * T.K_PARTIAL, begin[None, :])
    high = tl.minimum((block + 1) * T.K_PARTIAL, (begin + sizes[2])[None, :])
    within = (q < partial[1] * partial[2])[:, None] & (channel < sizes[1])[None, :]
    return tl.where(within, n[:, None] * tl.maximum(high - low, 0), 0)


@triton.jit
def merge_partials(
    p_partials, p_x, taking, channel, sizes, strides, partial, T: tl.constexpr,
):  # fmt: skip
    """The moments of channels [G] from all their partials: Q at a time, [Q, G], which one another join at the end."""
    zero = tl.full((T.Q, T.G), 0.0, tl.dtype(T.ACC))
    a = Moments(zero, zero, zero)
    last = index(partial[1] * partial[2], T)
    for start in range(0, last, T.Q):
        q = start + tl.arange(0, T.Q)
        share = partial_shares(q, channel, sizes, partial, T)
        o = q[:, None] * sizes[1] + channel[None, :]
        mean = tl.load(p_partials + o, mask=share > 0, other=0.0)
        m2 = tl.load(p_partials + last * sizes[1] + o, mask=share > 0, other=0.0)
        count = share
        if taking[1] is not None:
            count = tl.load(p_partials + 2 * last * sizes[1] + o, mask=share > 0, other=0.0)
        a = merge(a, Moments(count.to(tl.dtype(T.ACC)), mean, m2))
    a = merge_axis(a, 0)
    p_x = base_place(p_x, taking, sizes[2], strides)
    base = load_base(p_x, channel, strides, channel < sizes[1], T)
    # Chunks do not tell infinite from NaN, so that each of their values takes an instruction less. About a finite
    # mean, NaN was a square that the dtype cannot hold; about an infinite one the squares are NaN, as float64's.
    m2 = tl.where(a.m2 == a.m2, a.m2, float("inf")) + (a.mean - a.mean)
    return Moments(a.count, base + a.mean, m2)


@triton.jit
def moments_item(
    p_x, taking, p_partials, i_block, i_split, sizes, strides, partial, T: tl.constexpr,
):  # fmt: skip
    """Partial (mean, M2) of the channels in a block of columns and a range of rows.

    p_partials: [2, splits * blocks, C]. The counts follow from the geometry (:func:`partial_shares`); with a mask
    they are a third row.
    """
    row = row_length(sizes[1], sizes[2], T)
    columns = tile_columns(index(i_block, T) * T.K, row, sizes[2], strides, T)
    n_begin, n_ragged, n_end = row_range(i_split, partial[0], sizes[0], T)
    p_base = base_place(p_x, taking, sizes[2], strides)
    base = finite(load_columns(p_base, strides[1], columns, 0.0, T))
    zero = tl.full((T.R, T.K), 0.0, tl.dtype(T.ACC))
    ONE: tl.constexpr = taking[0] is None or T.EACH
    a = Moments(tl.full((T.R, 1 if ONE else T.K), 0.0, tl.dtype(T.ACC)), zero, zero)
    for n in tl.range(n_begin, n_ragged, T.R * T.U, num_stages=T.STAGES):
        x = load_chunk(
            p_x, n, n_end, strides[0], columns.offset, columns, T.U, T.U, "evict_last", T
        )
        takes = load_takes(taking[0], n, n_end, sizes[2], columns, T.U, T)
        a = merge(a, slot_moments(x, takes, base, n, n_end, False, T))
    if n_ragged < n_end:
        x = load_chunk(
            p_x, n_ragged, n_end, strides[0], columns.offset, columns, T.U, 0, "evict_last", T
        )
        takes = load_takes(taking[0], n_ragged, n_end, sizes[2], columns, T.U, T)
        a = merge(a, slot_moments(x, takes, base, n_ragged, n_end, True, T))

    a = fold_moments(a, columns, T)
    channel = columns.first + tl.arange(0, T.G)
    q = i_split * partial[2] + i_block - channel * sizes[2] // T.K
    o = q * sizes[1] + channel
    written = a.count > 0
    if taking[0] is not None:
        written = touched(columns, sizes, T) < sizes[1]
    tl.store(p_partials + o, a.mean, mask=written)
    o += index(partial[1] * partial[2], T) * sizes[1]
    tl.store(p_partials + o, a.m2, mask=written)
    if taking[0] is not None:
        o += index(partial[1] * partial[2], T) * sizes[1]
        tl.store(p_partials + o, a.count, mask=written)


@triton.jit
def moments_kernel(p_x, taking, p_partials, p_tracked, sizes, strides, partial, T: tl.constexpr):
    """The first launch of split: all the partial moments. It advances the counter of batches."""
    n_blocks = tl.cdiv(row_length(sizes[1], sizes[2], T), T.K)
    pid = tl.program_id(0)
    if p_tracked is not None:
        if pid == 0:
            tl.store(p_tracked, tl.load(p_tracked) + 1)
    moments_item(
        p_x, taking, p_partials, pid % n_blocks, pid // n_blocks, sizes, strides, partial, T
    )
