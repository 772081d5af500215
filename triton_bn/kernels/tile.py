"""Tiles: which values a program holds, and how column and channel vectors turn into one another."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Constants(NamedTuple):
    """What is fixed when a kernel is compiled: its tile, and what problem and plan say about it."""

    R: int  #: rows of a tile
    K: int  #: columns of a tile
    U: int  #: tiles in flight
    G: int  #: channels that a tile's columns may touch
    ACC: str  #: dtype of sums and statistics by its name: Triton's hooks write all this as JSON
    EACH: bool  #: every column is a channel of its own (S = 1)
    DENSE: bool  #: the input is dense like everything else
    VECTOR: int  #: divides the lengths of rows and the distances between them
    WIDE: bool  #: offsets need 64 bits
    MASKED: bool  #: a tile may reach past its last column
    KIND: Any  #: activation, or None
    PARAMETER: Any  #: the activation's parameter, or None
    OUTPUT: bool = False  #: backward is given y in the residual's place
    STAGES: int = 1  #: 2: loops over rows copy the next chunk during this one
    CHANNELS: int = 0  #: resident: whole channels of a program
    INNER: int = 0  #: resident: S
    WHOLE: int = 0  #: resident: tiles that do not reach past the last row
    Q: int = 1  #: partials merged at a time
    K_PARTIAL: int = 1  #: columns of the tile that the partials come from


class Columns(NamedTuple):
    """The columns of a tile: [begin, end) of a row, the first's channel, the next channel (where there is
    none, the first's), and per column [K] ..."""

    begin: Any
    end: Any
    first: Any
    second: Any
    k: Any  #: ... its position in a dense row,
    offset: Any  #: ... its position in a row of the input,
    mask: Any  #: ... whether it lies before the end,
    channel: Any  #: ... and its channel: [1] where all are of one, so that what it has is read and held once.


@triton.jit
def double(pair, ACC: tl.constexpr):
    """A Python float passed as two float32 parts, so that float64 problems get all its digits."""
    return tl.cast(pair[0], ACC) + tl.cast(pair[1], ACC)


@triton.jit
def inverse_std(variance, eps, T: tl.constexpr):
    """1 / sqrt(variance + eps). ``eps`` is a pair, and its own 1 / sqrt for where the sum is 0 in T.ACC:
    there all values are equal, and 0 * inf would be NaN. A GPU takes the smallest numbers for 0, hence the scale.
    """
    v = variance + double(eps, tl.dtype(T.ACC))
    small = v < 1e-35
    root = tl.rsqrt(tl.where(v == 0, 1.0, tl.where(small, v * 281474976710656.0, v)))  # 2**48
    return tl.where(v == 0, eps[2], tl.where(small, root * 16777216.0, root))


@triton.jit
def index(i, T: tl.constexpr):
    """A position or a size that is about to be multiplied: in int64 where offsets are."""
    if T.WIDE:
        return tl.cast(i, tl.int64)
    else:
        return i


@triton.jit
def row_length(channels, inner, T: tl.constexpr):
    """Values a dense row: C * S. It is a multiple of VECTOR, and this way the compiler knows: else a mask
    that ends with the row would split every 16-byte access."""
    return index(channels, T) * inner // T.VECTOR * T.VECTOR


@triton.jit
def tile_columns(begin, end, inner, strides, T: tl.constexpr):
    """Columns begin + [0, K) of rows that end at ``end``."""
    k = begin + tl.arange(0, T.K)
    first = begin // inner
    edge = (first + 1) * inner
    second = tl.where(edge < end, first + 1, first)
    if T.G == 1:
        channel = first + tl.arange(0, 1)
    elif T.G == 2:  # one division a program, not one a column
        channel = tl.where(k < edge, first, second)
    else:
        channel = k // inner
    if T.DENSE:
        offset = k
    else:
        offset = channel * strides[1] + (k - channel * inner) * strides[2]
    return Columns(begin, end, first, second, k, offset, k < end, channel)


@triton.jit
def tile_offsets(n, stride, o_column, VECTOR: tl.constexpr, T: tl.constexpr):
    """[R, K] offsets of rows n + [0, R), ``stride`` apart; VECTOR divides the stride."""
    i_row = index(n + tl.arange(0, T.R), T)
    return tl.multiple_of(i_row * stride, VECTOR)[:, None] + o_column[None, :]


@triton.jit
def tile_mask(n, n_end, m_column, RAGGED: tl.constexpr, T: tl.constexpr):
    """[R, K]: columns of the tile and, where it is RAGGED, rows before n_end."""
    if RAGGED:
        return (n + tl.arange(0, T.R) < n_end)[:, None] & m_column[None, :]
    else:
        return tl.broadcast_to(m_column[None, :], (T.R, T.K))


@triton.jit
def load(p, offsets, mask, MASKED: tl.constexpr, POLICY: tl.constexpr):
    """A tile; what is masked off reads as 0. An unmasked load costs half the instructions."""
    if MASKED:
        return tl.load(p + offsets, mask=mask, other=0.0, eviction_policy=POLICY)
    else:
        return tl.load(p + offsets, eviction_policy=POLICY)


@triton.jit
def store_dense(p, value, n, n_end, row, columns, RAGGED: tl.constexpr, T: tl.constexpr):
    """Writes a tile of a dense tensor, past L2 where it can: nobody here reads it again."""
    offsets = tile_offsets(n, row, columns.k, T.VECTOR, T)
    value = tl.cast(value, p.dtype.element_ty)
    if RAGGED or T.MASKED:
        mask = tile_mask(n, n_end, columns.mask, RAGGED, T)
        tl.store(p + offsets, value, mask=mask, eviction_policy="evict_first")
    else:
        tl.store(p + offsets, value, eviction_policy="evict_first")


@triton.jit
def load_chunk(
    p, n, n_end, stride, o_column, columns,
    U: tl.constexpr, WHOLE: tl.constexpr, POLICY: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """U tiles below one another, all in flight together. All but the first WHOLE may reach past the last row.

    Without p, none.
    """
    tiles = ()
    if p is not None:
        for u in tl.static_range(U):
            offsets = tile_offsets(n + u * T.R, stride, o_column, T.VECTOR, T)
            mask = tile_mask(n + u * T.R, n_end, columns.mask, u >= WHOLE, T)
            tiles = tiles + (load(p, offsets, mask, u >= WHOLE or T.MASKED, POLICY),)
    return tiles


@triton.jit
def load_takes(
    p_mask, n, n_end, inner, columns, U: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Which values of U tiles below one another take part, by a mask [outer, inner]: [R, K] each, or [R, 1] where
    all columns are at one place of it. Without a mask, none."""
    tiles = ()
    if p_mask is not None:
        for u in tl.static_range(U):
            i_row = n + u * T.R + tl.arange(0, T.R)
            if T.EACH:
                takes = tl.load(p_mask + i_row, mask=i_row < n_end, other=0)[:, None]
            else:
                k = columns.k - index(columns.channel, T) * inner
                offsets = (index(i_row, T) * inner)[:, None] + k[None, :]
                within = (i_row < n_end)[:, None] & columns.mask[None, :]
                takes = tl.load(p_mask + offsets, mask=within, other=0)
            tiles = tiles + (takes != 0,)
    return tiles


@triton.jit
def select(takes, u: tl.constexpr, value):
    """``value`` where tile u takes part, and 0 elsewhere; all of it without a mask."""
    if len(takes) == 0:
        return value
    else:
        return tl.where(takes[u], value, 0)


@triton.jit
def how_many(taking, count):
    """How many values of a channel take part, at least 1: ``count``, or where a mask says it."""
    if taking[1] is None:
        return count
    else:
        return tl.maximum(tl.load(taking[1]), 1)


@triton.jit
def row_range(i_split, rows, n, T: tl.constexpr):
    """The rows of a split: its first, where whole chunks of U tiles end, and its end."""
    begin = index(i_split, T) * rows
    end = tl.minimum(begin + rows, n)
    return begin, begin + tl.maximum(end - begin, 0) // (T.R * T.U) * (T.R * T.U), end


@triton.jit
def touched(columns, sizes, T: tl.constexpr):
    """[G]: the channels that columns of the tile belong to, and C beyond those."""
    channel = columns.first + tl.arange(0, T.G)
    return tl.where(channel * sizes[2] < columns.begin + T.K, channel, sizes[1])


@triton.jit
def owns(channel, i_block, i_split, sizes, T: tl.constexpr):
    """Whether an item is the one to write what there is once a channel: its first block, in the first split."""
    limit = tl.where(i_split == 0, sizes[1], 0)
    return (channel * sizes[2] // T.K == i_block) & (channel < limit)


@triton.jit
def members(columns, G: tl.constexpr):
    """[G, K]: whether column k belongs to channel first + g."""
    g = columns.channel - columns.first
    return (g[None, :] == tl.arange(0, G)[:, None]) & columns.mask[None, :]


@triton.jit
def fold_eights(v, T: tl.constexpr):
    """:func:`fold_sums` where the tile starts with a channel of 7 values or more: then 8 adjacent columns, which are
    what a thread holds of a row, belong to two channels at most, and only two sums a thread go further."""
    SLOTS: tl.constexpr = T.R * T.K // 8
    k = 8 * tl.arange(0, T.K // 8)
    end = (k // T.INNER + 1) * T.INNER
    is_first = (k[:, None] + tl.arange(0, 8)[None, :] < end[:, None])[None, :, :]
    v = tl.reshape(v, (T.R, T.K // 8, 8))
    first = tl.reshape(tl.sum(tl.where(is_first, v, 0), 2), (SLOTS,))[:, None]
    second = tl.reshape(tl.sum(tl.where(is_first, 0, v), 2), (SLOTS,))[:, None]
    channel = (tl.arange(0, SLOTS) * 8 % T.K // T.INNER)[:, None]
    g = tl.arange(0, T.G)[None, :]
    return tl.sum(tl.where(channel == g, first, 0) + tl.where(channel + 1 == g, second, 0), 0)


@triton.jit
def fold_sums(v, columns, T: tl.constexpr):
    """[R, K] sums of slots → [G] sums of channels first + g."""
    GROUP: tl.constexpr = T.G
    if T.EACH:
        return tl.where(columns.mask, tl.sum(v, 0), 0)
    elif T.G <= 2:  # at once: by rows and then by columns takes four times the barriers
        sums = tl.full((T.G,), 0.0, tl.dtype(T.ACC))
        for g in tl.static_range(GROUP):
            member = (columns.channel == columns.first + g) & columns.mask
            sums = tl.where(tl.arange(0, T.G) == g, tl.sum(tl.where(member, v, 0)), sums)
        return sums
    elif T.INNER >= 7:
        return fold_eights(v, T)
    else:
        return tl.sum(tl.where(members(columns, T.G), tl.sum(v, 0)[None, :], 0), 1)


@triton.jit
def spread(v, columns, T: tl.constexpr):
    """[G] channels → [1, K] columns, or [1, 1]: each column gets its channel's value."""
    if T.EACH or T.G == 1:
        return v[None, :]
    elif T.G == 2:
        is_first = tl.arange(0, 2) == 0
        first, second = tl.sum(tl.where(is_first, v, 0), 0), tl.sum(tl.where(is_first, 0, v), 0)
        return tl.where(columns.channel == columns.first, first, second)[None, :]
    else:
        g = tl.minimum(columns.channel - columns.first, T.G - 1)
        return tl.gather(v, tl.cast(g, tl.int32), 0)[None, :]


@triton.jit
def load_columns(p, stride, columns, default, T: tl.constexpr):
    """What each column's channel has at p + channel * stride, [1, K] or [1, 1]; without p the default."""
    if p is None:
        return tl.full((1, 1), default, tl.dtype(T.ACC))
    else:
        if T.G == 1:
            v = tl.load(p + columns.channel * stride)
        elif T.G == 2:  # two loads a program, not one a column
            first = tl.load(p + columns.first * stride)
            second = tl.load(p + columns.second * stride)
            v = tl.where(columns.channel == columns.first, first, second)
        else:
            v = tl.load(p + columns.channel * stride, mask=columns.mask, other=0.0)
        return v.to(tl.dtype(T.ACC))[None, :]
