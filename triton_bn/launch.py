"""The verbs on Triton kernels: allocate, lay out the grid, launch under a plan.

Tensors are those of :mod:`triton_bn.reference`'s verbs; x comes with the problem that describes it
(:func:`triton_bn.problem.describe`), and everything else has the dense layout of ``torch.empty_like(x)``.
"""

from __future__ import annotations

import ctypes
import math
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
except ModuleNotFoundError as error:
    error.msg = "triton_bn's kernels need Triton, which is not installed (pip install triton, or triton-windows)"
    raise

from triton_bn.kernels.backward import (
    backward_apply_kernel,
    backward_kernel,
    backward_reduce_kernel,
)
from triton_bn.kernels.forward import forward_kernel, normalize_kernel
from triton_bn.kernels.moments import moments_kernel
from triton_bn.kernels.ranks import merge_rows_kernel, row_kernel, sums_kernel
from triton_bn.kernels.streamed import backward_streamed_kernel, forward_streamed_kernel
from triton_bn.kernels.tile import Constants
from triton_bn.plan import Plan, Tile, channel_blocks, power_of_two, tile_channels
from triton_bn.problem import Problem, aligned_like

__all__ = ["backward", "forward", "merge", "normalize", "row"]


#: A mask in the input's canonical block, uint8 [outer, inner]; and how many values of a channel take part, and behind
#: that the first place in the block that does (backward needs no place). The latter is ``None`` where statistics are
#: given, both are without a mask.
Taking = tuple[Tensor | None, Tensor | None]

ALL: Taking = (None, None)


class Launch:
    """A kernel with all that does not change from one call to the next.

    Made once for a problem and a plan: their sizes and strides are ``statics``, the kernel's last run-time
    arguments, and ``constants`` what it is compiled for.
    """

    __slots__ = ("compiled", "constants", "kernel", "programs", "room", "statics")

    def __init__(
        self,
        kernel: Any,
        programs: int,
        statics: tuple[Any, ...],
        constants: dict[str, Any],
        room: tuple[int, ...] = (),
    ) -> None:
        self.kernel, self.programs = kernel, programs
        self.statics, self.constants = statics, constants
        #: The shape of the partials that it leaves.
        self.room = room
        #: By what may differ all the same (:func:`run`): the compiled kernel, and its arguments from statics on.
        self.compiled: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


#: Triton's interpreter keeps its grid, and what it has patched, for the whole process.
_interpreter = threading.Lock()


def run(wanted: Launch, given: tuple[Tensor | None, ...], arguments: tuple[Any, ...]) -> None:
    """The one place where kernels are launched, on the device of the first tensor.

    Triton works out at every call what the arguments let it specialize on. Here the compiled kernel is
    found by one look-up from the second call on.

    Args:
        given: the tensors among the arguments that come from a caller: of those dtype, alignment and absence
            decide which kernel is right. Those of the others, allocated here, follow from the problem.
        arguments: all that stand before ``wanted.statics``.
    """
    if interpreting():
        with _interpreter:
            wanted.kernel[(wanted.programs,)](*arguments, *wanted.statics, **wanted.constants)
        return
    device = arguments[0].get_device()  # negative on a CPU
    if device >= 0 and device != torch.cuda.current_device():
        with torch.cuda.device(device):
            run(wanted, given, arguments)
        return
    key: list[Any] = [device]
    for tensor in given:
        if tensor is None:
            key.append(None)
        else:
            key.append(tensor.dtype)
            key.append(tensor.data_ptr() & 15)
    found = wanted.compiled.get(tuple(key))
    if found is None:
        kernel, all_arguments = wanted.kernel, (*arguments, *wanted.statics)
        compiled = kernel[(wanted.programs,)](*all_arguments, **wanted.constants)
        last = [wanted.constants[name] for name in kernel.arg_names[len(all_arguments) :]]
        wanted.compiled[tuple(key)] = compiled[(wanted.programs, 1, 1)], (*wanted.statics, *last)
        return
    start, rest = found
    start(*arguments, *rest)


def _pair(value: float) -> tuple[float, float]:
    """A double as the float32 nearest to it and the rest (:func:`triton_bn.kernels.tile.double`)."""
    # No tensor: that would be on whatever device is the default.
    high = ctypes.c_float(value).value
    return high, value - high


_pair = lru_cache(maxsize=256)(_pair)


@lru_cache(maxsize=256)
def _regularizer(eps: float) -> tuple[float, float, float]:
    """eps as a pair, and 1 / sqrt(eps), as far as float32 goes (:func:`triton_bn.kernels.tile.inverse_std`)."""
    root = min(eps**-0.5, torch.finfo(torch.float32).max) if eps > 0 else math.inf
    return (*_pair(eps), root)


def accumulator(problem: Problem) -> torch.dtype:
    return torch.float64 if problem.dtype == torch.float64 else torch.float32


def _accumulator_name(problem: Problem) -> str:
    """What Triton calls the :func:`accumulator`."""
    return "fp64" if problem.dtype == torch.float64 else "fp32"


def _constants(problem: Problem, tile: Tile, **others: Any) -> Constants:
    act = problem.activation
    return Constants(
        R=tile.rows,
        K=tile.columns,
        U=tile.depth,
        STAGES=tile.stages,
        ACC=_accumulator_name(problem),
        EACH=problem.inner == 1,
        DENSE=problem.dense,
        VECTOR=problem.vector,
        WIDE=problem.wide,
        KIND=act and act.name,
        PARAMETER=act and act.parameter,
        OUTPUT=problem.output,
        **others,
    )


def _resident(problem: Problem, plan: Plan, kernel: Any, **options: Any) -> Launch:
    tile = plan.transform
    constants = _constants(
        problem,
        tile,
        G=tile.columns if problem.inner == 1 else power_of_two(plan.channels),
        MASKED=plan.channels * problem.inner != tile.columns
        or problem.channels % plan.channels != 0,
        CHANNELS=plan.channels,
        INNER=problem.inner,
        WHOLE=problem.outer // tile.rows,
    )
    programs = -(-problem.channels // plan.channels)
    statics = (problem.sizes, problem.strides)
    return Launch(kernel, programs, statics, _options(constants, tile, **options))


def _tiled(
    problem: Problem, tile: Tile, partial: Tile | None, **options: Any
) -> tuple[int, dict[str, Any]]:
    """Programs and constants of a launch over tiles that merges the partials of another tile."""
    group = power_of_two(tile_channels(tile.columns, problem.inner))
    others = {"G": group, "MASKED": problem.row % tile.columns != 0}
    if partial is not None:
        # About 4 values a thread at a time: more would cost the transform its registers. Few different
        # numbers: each is a kernel to compile.
        _, splits, blocks = _geometry(problem, partial)
        enough = next(q for q in (1, 4, 32, 1024) if q >= splits * blocks or q == 1024)
        others["Q"] = min(enough, max(128 * tile.warps // group, 1))
        others["K_PARTIAL"] = partial.columns
    programs = -(-problem.row // tile.columns) * tile.splits
    return programs, _options(_constants(problem, tile, **others), tile, **options)


def _reducing(problem: Problem, tile: Tile, kernel: Any) -> Launch:
    """The first launch of split: it leaves partials."""
    programs, constants = _tiled(problem, tile, None)
    geometry = _geometry(problem, tile)
    statics = (problem.sizes, problem.strides, geometry)
    return Launch(kernel, programs, statics, constants, _room(problem, geometry))


def _streamed(problem: Problem, plan: Plan, kernel: Any, **options: Any) -> Launch:
    items, constants = _tiled(problem, plan.transform, plan.transform, **options)
    geometry = _geometry(problem, plan.transform)
    statics = (problem.sizes, problem.strides, plan.window, geometry)
    room = _room(problem, geometry)
    return Launch(kernel, min(plan.programs, items), statics, constants, room)


def _counters(problem: Problem, plan: Plan, x: Tensor) -> Tensor:
    """What the programs of a streamed launch wait by, zero.

    A fresh memset a call: in a captured graph it is replayed with the launch, and nothing is left to reset.
    """
    windows = -(-problem.row // plan.transform.columns // plan.window)
    return torch.zeros(1 + windows, dtype=torch.int32, device=x.device)


def _geometry(problem: Problem, tile: Tile) -> tuple[int, int, int]:
    """(rows a split, splits, blocks a channel) of a launch over blocks of columns and ranges of rows."""
    chunk = tile.rows * tile.depth
    rows = -(-problem.outer // (tile.splits * chunk)) * chunk
    return rows, tile.splits, channel_blocks(tile.columns, problem.inner)


def _room(problem: Problem, geometry: tuple[int, int, int]) -> tuple[int, int, int]:
    """The shape of the partials that a launch of this geometry leaves: with a mask, counts as well."""
    return 3 if problem.masked else 2, geometry[1] * geometry[2], problem.channels


def _options(constants: Constants, tile: Tile, **options: Any) -> dict[str, Any]:
    return {"T": constants, "num_warps": tile.warps, "enable_fp_fusion": True, **options}


def _outputs(problem: Problem, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    y = torch.empty_like(x)
    rows = 3 if problem.masked and problem.training else 2  # the count, too
    stats = x.new_empty(rows, problem.channels, dtype=accumulator(problem))
    packed = None
    if problem.bits:
        packed = x.new_empty(problem.outer, -(-problem.row // 8), dtype=torch.uint8)
    return y, stats, packed


@lru_cache(maxsize=4096)
def _forward_launches(problem: Problem, plan: Plan) -> tuple[Launch, Launch | None]:
    """What a plan launches in training: the second is split's."""
    if plan.driver == "resident":
        return _resident(problem, plan, forward_kernel), None
    if plan.driver == "streamed":
        return _streamed(problem, plan, forward_streamed_kernel), None
    assert plan.reduce is not None
    return _reducing(problem, plan.reduce, moments_kernel), _normalizing(problem, plan, plan.reduce)


def forward(
    problem: Problem,
    plan: Plan,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    residual: Tensor | None,
    momentum: float | None,
    eps: float,
    taking: Taking = ALL,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Training: ``y``, ``stats`` (2, C) and the packed slopes; the running statistics advance in the same launch."""
    y, stats, packed = _outputs(problem, x)
    if residual is not None:
        residual = aligned_like(residual, y)
    first, second = _forward_launches(problem, plan)
    given = (x, residual, taking[0], weight, bias, running_mean, running_var, num_batches_tracked)
    affine, running = (weight, bias), (running_mean, running_var, num_batches_tracked)
    factor = _pair(0.0 if momentum is None else momentum)
    if plan.driver == "resident":
        run(
            first,
            given,
            (x, y, residual, packed, taking, affine, stats, running, factor, _regularizer(eps)),
        )
        return y, stats, packed
    partials = x.new_empty(*first.room, dtype=accumulator(problem))
    arguments = (
        x, y, residual, packed, taking, affine, stats, partials, running, factor, _regularizer(eps),
    )  # fmt: skip
    if second is None:
        run(first, given, (*arguments, _counters(problem, plan, x)))
        return y, stats, packed
    run(first, (x, taking[0], num_batches_tracked), (x, taking, partials, num_batches_tracked))
    run(second, given, arguments)
    return y, stats, packed


def _vectors(
    channels: int, tile: Tile | None, splits: int, acc: str, wide: bool = False
) -> tuple[int, dict[str, Any]]:
    """Programs and constants of a launch over vectors (C,): 8 channels a program, ``splits`` merged by each."""
    constants = Constants(
        R=1, K=1, U=1, G=8, ACC=acc, EACH=False, DENSE=True, VECTOR=1, WIDE=wide, MASKED=True,
        KIND=None, PARAMETER=None, Q=min(power_of_two(splits), 128),
        K_PARTIAL=1 if tile is None else tile.columns,
    )  # fmt: skip
    return -(-channels // 8), {"T": constants, "num_warps": 4, "enable_fp_fusion": True}


@lru_cache(maxsize=4096)
def _row_launches(problem: Problem, tile: Tile) -> tuple[Launch, Launch]:
    first = _reducing(problem, tile, moments_kernel)
    programs, constants = _vectors(problem.channels, tile, first.room[1], "fp64", problem.wide)
    return first, Launch(row_kernel, programs, first.statics, constants)


def row(problem: Problem, plan: Plan, x: Tensor, tag: int, taking: Taking = ALL) -> Tensor:
    """The row (:mod:`triton_bn.sync`) of x, (2 * C + 2,) of float64; ``tag`` stands for its dtype."""
    # A plan for given statistics has no tile to reduce by: the transform's walks x as well.
    first, second = _row_launches(problem, plan.reduce or plan.transform)
    partials = x.new_empty(*first.room, dtype=accumulator(problem))
    run(first, (x, taking[0], None), (x, taking, partials, None))
    sent = x.new_empty(2 * problem.channels + 2, dtype=torch.float64)
    run(second, (x, taking[1]), (partials, x, taking, sent, problem.count, tag))
    return sent


@lru_cache(maxsize=4096)
def _merge_launch(ranks: int, channels: int, cumulative: bool, partly: bool) -> Launch:
    programs, constants = _vectors(channels, None, ranks, "fp64")
    constants = {**constants, "CUMULATIVE": cumulative, "PARTLY": partly}
    return Launch(merge_rows_kernel, programs, (channels, ranks), constants)


def merge(
    rows: Tensor,
    count: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    partly: bool = False,
) -> tuple[Tensor, Tensor]:
    """The rows of all ranks, (ranks, 2 * C + 2), merged in their order; the running statistics advance.

    Args:
        count: (C,), of the dtype that the result shall have; the count of all is written there.
        partly: there is a mask, by which one value in all may take part.

    Returns:
        Mean and biased variance (2, C), undefined where no rank has a value; and a 1.0, or a 0.0 where the
        tags differ or there is one value a channel in all.
    """
    ranks, channels = rows.shape[0], count.numel()
    moments, agree = count.new_empty((2, channels)), rows.new_empty(())
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    cumulative = momentum is None and num_batches_tracked is not None
    launch = _merge_launch(ranks, channels, cumulative, partly)
    running = (running_mean, running_var, num_batches_tracked)
    factor = _pair(0.0 if momentum is None else momentum)
    run(launch, (rows, count, *running), (rows, moments, count, agree, running, factor))
    return moments, agree


@lru_cache(maxsize=4096)
def _normalize_launch(problem: Problem, plan: Plan) -> Launch:
    return _normalizing(problem, plan, None)


def _normalizing(problem: Problem, plan: Plan, partial: Tile | None) -> Launch:
    """The transform by the partials of a first launch's tile, or by given statistics."""
    tile = plan.transform
    programs, constants = _tiled(problem, tile, partial, CUMULATIVE=problem.cumulative)
    geometry = (0, 0, 0) if partial is None else _geometry(problem, partial)
    statics = (problem.sizes, problem.strides, _geometry(problem, tile)[0], geometry)
    return Launch(normalize_kernel, programs, statics, constants)


def normalize(
    problem: Problem,
    plan: Plan,
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    eps: float,
    stats: Tensor | None = None,
    taking: Taking = ALL,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The transform by a given mean and biased variance, both (C,): ``y``, ``stats`` and the packed slopes.

    ``stats`` may bring its room, two rows or more.
    """
    y, room, packed = _outputs(problem, x)
    stats = room if stats is None else stats
    if residual is not None:
        residual = aligned_like(residual, y)
    run(
        _normalize_launch(problem, plan),
        (x, residual, taking[0], weight, bias, mean, variance),
        (
            x, y, residual, packed, (taking[0], None), (weight, bias), stats, None, (mean, variance, None), _pair(0.0),
            _regularizer(eps),
        ),
    )  # fmt: skip
    return y, stats, packed


def again(
    problem: Problem,
    plan: Plan,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    taking: Taking = ALL,
) -> Tensor:
    """The ``y`` of a forward whose ``stats`` these are: bit for bit, whatever driver it ran by."""
    y = torch.empty_like(x)
    if residual is not None:
        residual = aligned_like(residual, y)
    run(
        _normalize_launch(problem, plan),
        (x, residual, taking[0], weight, bias, stats),
        (
            x, y, residual, None, (taking[0], None), (weight, bias), stats, None, (None, None, None), _pair(0.0),
            _regularizer(0.0),
        ),
    )  # fmt: skip
    return y


class _Backward(NamedTuple):
    """What a plan launches for the gradients that are needed; what it does not launch is ``None``."""

    whole: Launch | None
    reduce: Launch | None
    apply: Launch | None


@lru_cache(maxsize=4096)
def _backward_launches(
    problem: Problem, plan: Plan, needs: tuple[bool, bool, bool, bool], shared: bool
) -> _Backward:
    needs_x, needs_weight, needs_bias, needs_residual = needs
    training = problem.training or shared
    sums = needs_weight or needs_bias or (needs_x and training)
    stores = needs_x or (needs_residual and not _passes(problem))
    if plan.driver == "resident" and sums:
        return _Backward(_resident(problem, plan, backward_kernel, TRAINING=training), None, None)
    if plan.driver == "streamed" and sums and stores:
        whole = _streamed(problem, plan, backward_streamed_kernel, TRAINING=training)
        return _Backward(whole, None, None)
    reduce = None
    if sums:
        assert plan.reduce is not None
        reduce = _reducing(problem, plan.reduce, backward_reduce_kernel)
    if not stores and (shared or not sums):
        return _Backward(None, reduce, None)
    programs, constants = _tiled(problem, plan.transform, plan.reduce, TRAINING=training)
    if not stores:
        # Only the merge of the partials is left: one program for each block of columns.
        programs //= plan.transform.splits
    geometry = (0, 0, 0)
    if reduce is not None:
        geometry = (problem.outer, 1, 1) if shared else reduce.statics[-1]
    rows = _geometry(problem, plan.transform)[0]
    statics = (problem.sizes, problem.strides, rows, geometry)
    return _Backward(None, reduce, Launch(backward_apply_kernel, programs, statics, constants))


def _passes(problem: Problem) -> bool:
    """Whether the residual's gradient is dy itself: where there is no activation, and all takes part."""
    return problem.activation is None and not problem.masked


def backward(
    problem: Problem,
    plan: Plan,
    dy: Tensor,
    x: Tensor | None,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    packed: Tensor | None,
    needs: tuple[bool, bool, bool, bool],
    share: Callable[[Tensor], None] | None = None,
    taking: Taking = ALL,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias, dresidual, each where ``needs`` says so, else ``None``.

    x may be ``None`` where neither the sums nor the activation's slope need it; ``residual`` is y where the
    problem says so. Where the batch is shared with other processes, ``share`` turns this one's sums (2, 1, C)
    into the means over all values of the batch, between the two launches; the problem is then that of given
    statistics.
    """
    like = torch.empty_like(dy if x is None else x)
    dy = aligned_like(dy, like)
    if residual is not None:
        residual = aligned_like(residual, like)
    needs_x, needs_weight, needs_bias, needs_residual = needs
    dx = like if needs_x else None
    dresidual = None
    if needs_residual:
        dresidual = dy if _passes(problem) else torch.empty_like(like)
    dweight = torch.empty_like(weight) if needs_weight and weight is not None else None
    # No bias where backward need not read it: all parameters share one dtype.
    dbias = None
    if needs_bias:
        template = weight if bias is None else bias
        dbias = torch.empty_like(stats[1] if template is None else template)
    affine, dparameters = (weight, bias), (dweight, dbias)
    stored = None if _passes(problem) else dresidual
    whole, reduce, apply = _backward_launches(problem, plan, needs, share is not None)
    if share is not None:
        taking = (taking[0], None)  # the sums become means
    given = (dy, x, residual, packed, *taking, weight, bias, stats)
    read = (dy, x, residual, packed, taking, affine, stats)
    gradients = (dx, dweight, dbias, dresidual)
    if whole is not None and plan.driver == "resident":
        run(whole, given, (*read, dx, stored, dparameters))
        return gradients
    if whole is not None:
        partials = dy.new_empty(*whole.room, dtype=accumulator(problem))
        counters = _counters(problem, plan, dy)
        run(whole, given, (*read, partials, dx, stored, dparameters, problem.count, counters))
        return gradients
    merged, count = None, problem.count
    if reduce is not None:
        merged = dy.new_empty(*reduce.room, dtype=accumulator(problem))
        run(reduce, given, (*read, merged))
        if share is not None:
            merged = _merged_sums(problem, plan, merged, stats, dparameters)
            count, dparameters = 1, (None, None)
            if dx is not None:
                share(merged)
    if apply is not None:
        run(apply, given, (*read, merged, dx, stored, dparameters, count))
    return gradients


@lru_cache(maxsize=4096)
def _sums_launch(problem: Problem, tile: Tile) -> Launch:
    geometry = _geometry(problem, tile)
    splits, acc = geometry[1] * geometry[2], _accumulator_name(problem)
    programs, constants = _vectors(problem.channels, tile, splits, acc, problem.wide)
    return Launch(sums_kernel, programs, (problem.sizes, geometry), constants)


def _merged_sums(
    problem: Problem,
    plan: Plan,
    partials: Tensor,
    stats: Tensor,
    dparameters: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """This process's sums as one partial (2, 1, C); dweight and dbias are written."""
    assert plan.reduce is not None
    sums = partials.new_empty(2, 1, problem.channels)
    given = (stats, *dparameters)
    run(_sums_launch(problem, plan.reduce), given, (partials, sums, stats, dparameters))
    return sums


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter, so that they take CPU tensors."""
    return not isinstance(forward_kernel, triton.JITFunction)
