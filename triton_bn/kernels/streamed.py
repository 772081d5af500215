"""One persistent launch for tensors far beyond L2: what the moments read, the transform finds in L2.

The columns are cut into windows of blocks. An item is one block and one range of rows of a window, in its
first phase (moments, or sums) or its second (transform, or gradients). Programs draw tickets in order; where
no channel reaches further than into the next window::

    first 0, first 1, second 0, first 2, second 1, first 3, second 2, ...

and where one reaches ``ahead`` windows further, second 0 follows first ``ahead``. A second-phase item waits
for the first-phase items of every window that its channels touch. Those have lower tickets, and first-phase
items never wait: so every wait ends, however few programs run at a time, one after another included.
"""

import triton
import triton.language as tl

from triton_bn.kernels.backward import apply_item, reduce_item
from triton_bn.kernels.forward import normalize_item
from triton_bn.kernels.moments import moments_item
from triton_bn.kernels.tile import index, row_length


@triton.jit
def draw(p_counters):
    """The next ticket."""
    return tl.atomic_add(p_counters, 1, sem="relaxed")


@triton.jit
def tickets(sizes, window, partial, T: tl.constexpr):
    """(blocks, items a phase of a window, windows that a channel reaches ahead or 1, all tickets).

    ``partial`` is (rows a split, splits, blocks a channel).
    """
    n_blocks = tl.cdiv(row_length(sizes[1], sizes[2], T), T.K)
    items = window * partial[1]
    ahead = tl.maximum(tl.cdiv(partial[2] - 1, window), 1)
    return n_blocks, items, ahead, (2 * tl.cdiv(n_blocks, window) + ahead) * items


@triton.jit
def decode(ticket, items, ahead, window):
    """(whether it is of the second phase, window, block, split) of a ticket."""
    phase = ticket // items
    turn = phase - ahead  # 1, 3, 5, ...: of the second phase
    second = (turn > 0) & (turn % 2 == 1)
    i_window = tl.where(second, turn // 2, tl.where(turn > 0, ahead + turn // 2, phase))
    item = ticket % items
    return second, i_window, i_window * window + item % window, item // window


@triton.jit
def publish_item(p_counters, i_window):
    """Counts a first-phase item of a window, after all threads have written what they found."""
    tl.debug_barrier()
    tl.atomic_add(p_counters + 1 + i_window, 1, sem="acq_rel")


@triton.jit
def await_windows(p_counters, i_block, n_blocks, sizes, splits, window, T: tl.constexpr):
    """Until the first phase is over of every window that a block's channels touch."""
    begin = index(i_block, T) * T.K
    end = tl.minimum(begin + T.K, row_length(sizes[1], sizes[2], T))
    first = begin // sizes[2] * sizes[2] // T.K
    last = (tl.cdiv(end, sizes[2]) * sizes[2] - 1) // T.K
    for w in range(first // window, last // window + 1):
        items = tl.minimum(window, n_blocks - w * window) * splits
        # In the condition, so that no compiler takes the load out of the loop.
        while tl.atomic_add(p_counters + 1 + w, 0, sem="acquire") < items:
            pass
    tl.debug_barrier()


@triton.jit
def forward_streamed_kernel(
    p_x, p_y, p_residual, p_bits, taking, parameters, p_stats, p_partials, running, momentum, eps, p_counters,
    sizes, strides, window, partial, T: tl.constexpr,
):  # fmt: skip
    """Training in one launch: :func:`moments_item` and :func:`normalize_item` by tickets.

    p_counters: int32 zeros [1 + windows]: the next ticket, and how many first-phase items of each window are done.
    """
    n_blocks, items, ahead, last = tickets(sizes, window, partial, T)
    if running[2] is not None:
        if tl.program_id(0) == 0:
            tl.store(running[2], tl.load(running[2]) + 1)
    ticket = draw(p_counters)
    while ticket < last:
        second, i_window, i_block, i_split = decode(ticket, items, ahead, window)
        if i_block < n_blocks:
            if second:
                await_windows(p_counters, i_block, n_blocks, sizes, partial[1], window, T)
                normalize_item(
                    p_x, p_y, p_residual, p_bits, taking, parameters, p_stats, p_partials, running, momentum, eps,
                    i_block, i_split, sizes, strides, partial[0], partial, False, T,
                )  # fmt: skip
            else:
                moments_item(p_x, taking, p_partials, i_block, i_split, sizes, strides, partial, T)
                publish_item(p_counters, i_window)
        ticket = draw(p_counters)


@triton.jit
def backward_streamed_kernel(
    p_dy, p_x, p_residual, p_bits, taking, parameters, p_stats, p_partials, p_dx, p_dresidual, dparameters, count,
    p_counters, sizes, strides, window, partial, TRAINING: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """All gradients in one launch: :func:`reduce_item` and :func:`apply_item` by tickets."""
    n_blocks, items, ahead, last = tickets(sizes, window, partial, T)
    ticket = draw(p_counters)
    while ticket < last:
        second, i_window, i_block, i_split = decode(ticket, items, ahead, window)
        if i_block < n_blocks:
            if second:
                await_windows(p_counters, i_block, n_blocks, sizes, partial[1], window, T)
                apply_item(
                    p_dy, p_x, p_residual, p_bits, taking, parameters, p_stats, p_partials, p_dx, p_dresidual,
                    dparameters, count, i_block, i_split, sizes, strides, partial[0], partial, TRAINING, T,
                )  # fmt: skip
            else:
                reduce_item(
                    p_dy, p_x, p_residual, p_bits, taking, parameters, p_stats, p_partials, i_block, i_split,
                    sizes, strides, partial, T,
                )  # fmt: skip
                publish_item(p_counters, i_window)
        ticket = draw(p_counters)
