"""Tiles: which values a program holds, and how column and channel vectors turn into one another."""

import triton
import triton.language as tl


@triton.jit
def double(pair, ACC: tl.constexpr):
    """A Python float passed as two float32 parts, so that float64 problems get all its digits."""
    return tl.cast(pair[0], ACC) + tl.cast(pair[1], ACC)


@triton.jit
def tile_columns(k_begin, k_end, sizes, strides, K: tl.constexpr, DENSE: tl.constexpr):
    """Columns k_begin + [0, K): their positions in a row, their channels, offsets in the input, mask."""
    k = k_begin + tl.arange(0, K)
    c = k // sizes[2]
    if DENSE:
        o_x = k
    else:
        o_x = c * strides[1] + (k - c * sizes[2]) * strides[2]
    return k, c, o_x, k < k_end


@triton.jit
def tile_offsets(n, stride, o_column, R: tl.constexpr, VECTOR: tl.constexpr, WIDE: tl.constexpr):
    """[R, K] offsets of rows n + [0, R), ``stride`` apart; VECTOR divides the stride."""
    i_row = n + tl.arange(0, R)
    if WIDE:
        i_row = i_row.to(tl.int64)
    return tl.multiple_of(i_row * stride, VECTOR)[:, None] + o_column[None, :]


@triton.jit
def tile_mask(n, n_end, m_column, R: tl.constexpr, K: tl.constexpr):
    """[R, K]: rows before n_end, columns of the tile."""
    return (n + tl.arange(0, R) < n_end)[:, None] & m_column[None, :]


@triton.jit
def load(p, offsets, mask, MASKED: tl.constexpr, POLICY: tl.constexpr):
    """A tile; what is masked off reads as 0. An unmasked load costs half the instructions."""
    if MASKED:
        return tl.load(p + offsets, mask=mask, other=0.0, eviction_policy=POLICY)
    else:
        return tl.load(p + offsets, eviction_policy=POLICY)


@triton.jit
def store(p, offsets, value, mask, MASKED: tl.constexpr, POLICY: tl.constexpr):
    value = tl.cast(value, p.dtype.element_ty)
    if MASKED:
        tl.store(p + offsets, value, mask=mask, eviction_policy=POLICY)
    else:
        tl.store(p + offsets, value, eviction_policy=POLICY)


@triton.jit
def members(c, first, m_column, G: tl.constexpr):
    """[G, K]: whether column k belongs to channel first + g."""
    return ((c - first)[None, :] == tl.arange(0, G)[:, None]) & m_column[None, :]


@triton.jit
def fold_sums(v, c, first, m_column, G: tl.constexpr, EACH: tl.constexpr):
    """[K] column sums → [G] channel sums. EACH: column k is channel first + k."""
    if EACH:
        return tl.where(m_column, v, 0)
    else:
        return tl.sum(tl.where(members(c, first, m_column, G), v[None, :], 0), 1)


@triton.jit
def spread(v, c, first, G: tl.constexpr, EACH: tl.constexpr):
    """[G] channels → [K] columns: each column gets its channel's value."""
    if EACH:
        return v
    else:
        return tl.gather(v, tl.minimum(c - first, G - 1).to(tl.int32), 0)


@triton.jit
def load_channel(p, c, mask, default, ACC: tl.constexpr):
    """A parameter's value for each of the channels c, or the default where there is no parameter."""
    if p is None:
        return tl.full(c.shape, default, ACC)
    else:
        return tl.load(p + c, mask=mask, other=0.0).to(ACC)
