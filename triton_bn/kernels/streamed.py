"""One persistent launch for tensors far beyond L2: what the moments read, the transform finds in L2.

The columns are cut into windows of blocks. An item is one block and one range of rows of a window, in its
first phase (moments, or sums) or its second (transform, or gradients). Programs draw tickets in order::

    first 0, first 1, second 0, first 2, second 1, first 3, second 2, ...

A second-phase item waits for the first-phase items of its own window and of its neighbours (with which it may
share a channel). Those have lower tickets, and first-phase items never wait: so every wait ends, however few
programs run at a time, one after another included.
"""

import triton
import triton.language as tl

from triton_bn.kernels.backward import apply_item, reduce_item
from triton_bn.kernels.forward import normalize_item
from triton_bn.kernels.moments import moments_item
from triton_bn.kernels.tile import row_length


@triton.jit
def draw(p_counters):
    """The next ticket."""
    return tl.atomic_add(p_counters, 1, sem="relaxed")


@triton.jit
def tickets(sizes, splits, window, T: tl.constexpr):
    """(blocks, windows, items a phase of a window, all tickets)."""
    n_blocks = tl.cdiv(row_length(sizes[1], sizes[2], T), T.K)
    n_windows = tl.cdiv(n_blocks, window)
    items = window * splits
    return n_blocks, n_windows, items, (2 * n_windows + 1) * items


@triton.jit
def decode(ticket, items, window):
    """(whether it is of the second phase, window, block, split) of a ticket."""
    phase = ticket // items
    second = (phase % 2 == 0) & (phase > 0)
    i_window = tl.where(second, phase // 2 - 1, (phase + 1) // 2)
    item = ticket % items
    return second, i_window, i_window * window + item % window, item // window


@triton.jit
def publish_item(p_counters, i_window):
    """Counts a first-phase item of a window, after all threads have written what they found."""
    tl.debug_barrier()
    tl.atomic_add(p_counters + 1 + i_window, 1, sem="acq_rel")


@triton.jit
def await_windows(p_counters, i_window, n_windows, n_blocks, splits, window):
    """Until the first phase of a window and of its neighbours is over."""
    for w in range(tl.maximum(i_window - 1, 0), tl.minimum(i_window + 2, n_windows)):
        items = tl.minimum(window, n_blocks - w * window) * splits
        # In the condition, so that no compiler takes the load out of the loop.
        while tl.atomic_add(p_counters + 1 + w, 0, sem="acquire") < items:
            pass
    tl.debug_barrier()


@triton.jit
def forward_streamed_kernel(
    p_x, p_y, p_residual, p_bits, parameters, p_stats, p_partials, running, momentum, eps, p_counters,
    sizes, strides, window, partial, T: tl.constexpr,
):  # fmt: skip
    """Training in one launch: :func:`moments_item` and :func:`normalize_item` by tickets.

    p_counters: int32 zeros [1 + windows]: the next ticket, and how many first-phase items of each window are done.
    """
    n_blocks, n_windows, items, last = tickets(sizes, partial[1], window, T)
    if running[2] is not None:
        if tl.program_id(0) == 0:
            tl.store(running[2], tl.load(running[2]) + 1)
    ticket = draw(p_counters)
    while ticket < last:
        second, i_window, i_block, i_split = decode(ticket, items, window)
        if i_block < n_blocks:
            if second:
                await_windows(p_counters, i_window, n_windows, n_blocks, partial[1], window)
                normalize_item(
                    p_x, p_y, p_residual, p_bits, parameters, p_stats, p_partials, running, momentum, eps,
                    i_block, i_split, sizes, strides, partial[0], partial, False, T,
                )  # fmt: skip
            else:
                moments_item(p_x, p_partials, i_block, i_split, sizes, strides, partial, T)
                publish_item(p_counters, i_window)
        ticket = draw(p_counters)


@triton.jit
def backward_streamed_kernel(
    p_dy, p_x, p_residual, p_bits, parameters, p_stats, p_partials, p_dx, p_dresidual, dparameters, count,
    p_counters, sizes, strides, window, partial, TRAINING: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """All gradients in one launch: :func:`reduce_item` and :func:`apply_item` by tickets."""
    n_blocks, n_windows, items, last = tickets(sizes, partial[1], window, T)
    ticket = draw(p_counters)
    while ticket < last:
        second, i_window, i_block, i_split = decode(ticket, items, window)
        if i_block < n_blocks:
            if second:
                await_windows(p_counters, i_window, n_windows, n_blocks, partial[1], window)
                apply_item(
                    p_dy, p_x, p_residual, p_bits, parameters, p_stats, p_partials, p_dx, p_dresidual,
                    dparameters, count, i_block, i_split, sizes, strides, partial[0], partial, TRAINING, T,
                )  # fmt: skip
            else:
                reduce_item(
                    p_dy, p_x, p_residual, p_bits, parameters, p_stats, p_partials, i_block, i_split,
                    sizes, strides, partial, T,
                )  # fmt: skip
                publish_item(p_counters, i_window)
        ticket = draw(p_counters)
