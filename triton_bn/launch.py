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
from typing import Any

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


_launchers: dict[tuple[Any, ...], Any] = {}

#: Triton's interpreter keeps its grid, and what it has patched, for the whole process.
_interpreter = threading.Lock()


def run(kernel: Any, programs: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
    """The one place where kernels are launched, on the device of the first argument.

    Triton works out at every call what the arguments let it specialise on. What decides that is
    a key here, so that from the second call on the compiled kernel is found by one look-up.
    """
    if interpreting():
        with _interpreter:
            kernel[(programs,)](*arguments, **constants)
        return
    device = arguments[0].device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            run(kernel, programs, arguments, constants)
        return
    key = (id(kernel), programs, device.index, *constants.values(), *_pattern(arguments))
    found = _launchers.get(key)
    if found is None:
        compiled = kernel[(programs,)](*arguments, **constants)
        if len(_launchers) >= 4096:
            _launchers.clear()
        _launchers[key] = compiled[(programs, 1, 1)], kernel.arg_names[len(arguments) :]
        return
    launcher, names = found
    launcher(*arguments, *[constants[name] for name in names])


def _pattern(arguments: tuple[Any, ...]) -> list[Any]:
    """What a compiled kernel depends on: dtypes and alignment of tensors, integers, what is absent.

    At every call: hence the exact types (a float decides nothing, so it is left out).
    """
    pattern: list[Any] = []
    for argument in arguments:
        for part in argument if type(argument) is tuple else (argument,):
            kind = type(part)
            if kind is int or part is None:
                pattern.append(part)
            elif kind is not float:
                pattern.append(part.dtype)
                pattern.append(part.data_ptr() & 15)
    return pattern


def _pair(value: float) -> tuple[float, float]:
    """A double as the float32 nearest to it and the rest (:func:`triton_bn.kernels.tile.double`)."""
    high = ctypes.c_float(
        value
    ).value  # no tensor, which would be on whatever device is the default
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
        **others,
    )


@lru_cache(maxsize=4096)
def _resident(problem: Problem, plan: Plan) -> tuple[int, dict[str, Any]]:
    """Programs and constants of a resident launch."""
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
    return -(-problem.channels // plan.channels), _options(constants, tile)


@lru_cache(maxsize=4096)
def _tiled(problem: Problem, tile: Tile, partial: Tile | None) -> tuple[int, int, dict[str, Any]]:
    """Programs, rows a split and constants of a launch that merges the partials of another tile."""
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
    return (
        programs,
        _geometry(problem, tile)[0],
        _options(_constants(problem, tile, **others), tile),
    )


def _streamed(
    problem: Problem, plan: Plan, x: Tensor
) -> tuple[int, tuple[Any, ...], dict[str, Any]]:
    """Programs, (counters, partials, geometry) and constants of a streamed launch."""
    items, _, constants = _tiled(problem, plan.transform, plan.transform)
    windows = -(-items // plan.transform.splits // plan.window)
    # A fresh memset a call: in a captured graph it is replayed with the launch, and nothing is left to reset.
    counters = torch.zeros(1 + windows, dtype=torch.int32, device=x.device)
    partials, geometry = _partials(problem, plan.transform, x)
    return min(plan.programs, items), (counters, partials, geometry), constants


def _geometry(problem: Problem, tile: Tile) -> tuple[int, int, int]:
    """(rows a split, splits, blocks a channel) of a launch over blocks of columns and ranges of rows."""
    chunk = tile.rows * tile.depth
    rows = -(-problem.outer // (tile.splits * chunk)) * chunk
    return rows, tile.splits, channel_blocks(tile.columns, problem.inner)


def _options(constants: Constants, tile: Tile) -> dict[str, Any]:
    return {"T": constants, "num_warps": tile.warps, "enable_fp_fusion": True}


def _partials(problem: Problem, tile: Tile, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
    """Room for what the programs of a first launch find, and its geometry."""
    geometry = _geometry(problem, tile)
    shape = (2, geometry[1] * geometry[2], problem.channels)
    return x.new_empty(shape, dtype=accumulator(problem)), geometry


def _outputs(problem: Problem, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    y = torch.empty_like(x)
    stats = x.new_empty((2, problem.channels), dtype=accumulator(problem))
    packed = None
    if problem.bits:
        packed = x.new_empty((problem.outer, -(-problem.row // 8)), dtype=torch.uint8)
    return y, stats, packed


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Training: ``y``, ``stats`` (2, C) and the packed slopes; the running statistics advance in the same launch."""
    y, stats, packed = _outputs(problem, x)
    if residual is not None:
        residual = aligned_like(residual, y)
    factor = _pair(0.0 if momentum is None else momentum)
    running = (running_mean, running_var, num_batches_tracked)
    if plan.driver == "resident":
        programs, constants = _resident(problem, plan)
        run(
            forward_kernel,
            programs,
            (
                x, y, residual, packed, (weight, bias), stats, running, factor, _regularizer(eps),
                problem.sizes, problem.strides,
            ),
            constants,
        )  # fmt: skip
        return y, stats, packed
    if plan.driver == "streamed":
        programs, (counters, partials, geometry), constants = _streamed(problem, plan, x)
        run(
            forward_streamed_kernel,
            programs,
            (
                x, y, residual, packed, (weight, bias), stats, partials, running, factor, _regularizer(eps),
                counters, problem.sizes, problem.strides, plan.window, geometry,
            ),
            constants,
        )  # fmt: skip
        return y, stats, packed
    assert plan.reduce is not None
    partials, geometry = _moments(problem, plan.reduce, x, num_batches_tracked)
    _normalize(
        problem,
        plan,
        x,
        y,
        residual,
        packed,
        weight,
        bias,
        stats,
        partials,
        running,
        factor,
        eps,
        geometry,
    )
    return y, stats, packed


def _moments(
    problem: Problem, tile: Tile, x: Tensor, num_batches_tracked: Tensor | None
) -> tuple[Tensor, tuple[int, int, int]]:
    """Partial moments and their geometry."""
    partials, geometry = _partials(problem, tile, x)
    programs, _, constants = _tiled(problem, tile, None)
    run(
        moments_kernel,
        programs,
        (x, partials, num_batches_tracked, problem.sizes, problem.strides, geometry),
        constants,
    )
    return partials, geometry


@lru_cache(maxsize=4096)
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


def row(problem: Problem, plan: Plan, x: Tensor, tag: int) -> Tensor:
    """The row (:mod:`triton_bn.sync`) of x, (2 * C + 2,) of float64."""
    # A plan for given statistics has no tile to reduce by: the transform's walks x as well.
    tile = plan.reduce or plan.transform
    partials, geometry = _moments(problem, tile, x, None)
    sent = x.new_empty(2 * problem.channels + 2, dtype=torch.float64)
    programs, constants = _vectors(
        problem.channels, tile, geometry[1] * geometry[2], "fp64", problem.wide
    )
    arguments = (partials, x, sent, problem.count, tag, problem.sizes, problem.strides, geometry)
    run(row_kernel, programs, arguments, constants)
    return sent


def merge(
    rows: Tensor,
    count: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
) -> tuple[Tensor, Tensor]:
    """The rows of all ranks, (ranks, 2 * C + 2), merged in their order; the running statistics advance.

    Args:
        count: (C,), of the dtype that the result shall have; the count of all is written there.

    Returns:
        Mean and biased variance (2, C), undefined where no rank has a value; and a 1.0, or a 0.0 where the
        tags differ or there is one value a channel in all.
    """
    ranks, channels = rows.shape[0], count.numel()
    moments, agree = count.new_empty((2, channels)), rows.new_empty(())
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    programs, constants = _vectors(channels, None, ranks, "fp64")
    cumulative = momentum is None and num_batches_tracked is not None
    run(
        merge_rows_kernel,
        programs,
        (
            rows, moments, count, agree, (running_mean, running_var, num_batches_tracked),
            _pair(0.0 if momentum is None else momentum), channels, ranks,
        ),
        {**constants, "CUMULATIVE": cumulative},
    )  # fmt: skip
    return moments, agree


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
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The transform by a given mean and biased variance, both (C,): ``y``, ``stats`` and the packed slopes.

    ``stats`` may bring its room, two rows or more.
    """
    y, room, packed = _outputs(problem, x)
    stats = room if stats is None else stats
    if residual is not None:
        residual = aligned_like(residual, y)
    running = (mean, variance, None)
    _normalize(
        problem,
        plan,
        x,
        y,
        residual,
        packed,
        weight,
        bias,
        stats,
        None,
        running,
        _pair(0.0),
        eps,
        (0, 0, 0),
    )
    return y, stats, packed


def again(
    problem: Problem,
    plan: Plan,
    x: Tensor,
    stats: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """The ``y`` of a forward whose ``stats`` these are: bit for bit, whatever driver it ran by."""
    y = torch.empty_like(x)
    if residual is not None:
        residual = aligned_like(residual, y)
    given, nothing = (None, None, None), (0, 0, 0)
    _normalize(
        problem, plan, x, y, residual, None, weight, bias, stats, None, given, _pair(0.0), 0.0, nothing
    )  # fmt: skip
    return y


def _normalize(
    problem: Problem,
    plan: Plan,
    x: Tensor,
    y: Tensor,
    residual: Tensor | None,
    packed: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    partials: Tensor | None,
    running: tuple[Tensor | None, Tensor | None, Tensor | None],
    factor: tuple[float, float],
    eps: float,
    geometry: tuple[int, int, int],
) -> None:
    programs, rows, constants = _tiled(problem, plan.transform, plan.reduce)
    run(
        normalize_kernel,
        programs,
        (
            x, y, residual, packed, (weight, bias), stats, partials, running, factor, _regularizer(eps),
            problem.sizes, problem.strides, rows, geometry,
        ),
        {**constants, "CUMULATIVE": problem.cumulative},
    )  # fmt: skip


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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dx, dweight, dbias, dresidual, each where ``needs`` says so, else ``None``.

    x may be ``None`` where neither the sums nor the activation's slope need it. Where the batch is shared
    with other processes, ``share`` turns this one's sums (2, 1, C) into the means over all values of the
    batch, between the two launches; the problem is then that of given statistics.
    """
    like = torch.empty_like(dy if x is None else x)
    dy = aligned_like(dy, like)
    if residual is not None:
        residual = aligned_like(residual, like)
    needs_x, needs_weight, needs_bias, needs_residual = needs
    dx = like if needs_x else None
    dresidual = None
    if needs_residual:
        # Without an activation the residual's gradient is dy itself.
        dresidual = dy if problem.activation is None else torch.empty_like(like)
    dweight = torch.empty_like(weight) if needs_weight and weight is not None else None
    # No bias where backward need not read it: all parameters share one dtype.
    template = next(t for t in (bias, weight, stats[1]) if t is not None)
    dbias = torch.empty_like(template) if needs_bias else None
    affine, dparameters = (weight, bias), (dweight, dbias)
    stored = None if problem.activation is None else dresidual
    training, count = problem.training or share is not None, problem.count
    sums = needs_weight or needs_bias or (needs_x and training)
    if plan.driver == "resident" and sums:
        programs, constants = _resident(problem, plan)
        run(
            backward_kernel,
            programs,
            (
                dy, x, residual, packed, affine, stats, dx, stored, dparameters,
                problem.sizes, problem.strides,
            ),
            {**constants, "TRAINING": training},
        )  # fmt: skip
        return dx, dweight, dbias, dresidual
    if plan.driver == "streamed" and sums and (dx is not None or stored is not None):
        programs, (counters, partials, geometry), constants = _streamed(problem, plan, dy)
        run(
            backward_streamed_kernel,
            programs,
            (
                dy, x, residual, packed, affine, stats, partials, dx, stored, dparameters, problem.count,
                counters, problem.sizes, problem.strides, plan.window, geometry,
            ),
            {**constants, "TRAINING": training},
        )  # fmt: skip
        return dx, dweight, dbias, dresidual
    partials, geometry = None, (0, 0, 0)
    if sums:
        assert plan.reduce is not None
        partials, geometry = _partials(problem, plan.reduce, dy)
        programs, _, constants = _tiled(problem, plan.reduce, None)
        run(
            backward_reduce_kernel,
            programs,
            (
                dy, x, residual, packed, affine, stats, partials,
                problem.sizes, problem.strides, geometry,
            ),
            constants,
        )  # fmt: skip
        if share is not None:
            partials = _merged_sums(problem, plan.reduce, partials, geometry, stats, dparameters)
            geometry, count, dparameters = (problem.outer, 1, 1), 1, (None, None)
            if dx is not None:
                share(partials)
    programs, rows, constants = _tiled(problem, plan.transform, plan.reduce)
    if dx is None and stored is None:
        if partials is None or share is not None:
            return dx, dweight, dbias, dresidual
        # Only the merge of the partials is left: one program for each block of columns.
        programs //= plan.transform.splits
    run(
        backward_apply_kernel,
        programs,
        (
            dy, x, residual, packed, affine, stats, partials, dx, stored, dparameters, count,
            problem.sizes, problem.strides, rows, geometry,
        ),
        {**constants, "TRAINING": training},
    )  # fmt: skip
    return dx, dweight, dbias, dresidual


def _merged_sums(
    problem: Problem,
    tile: Tile,
    partials: Tensor,
    geometry: tuple[int, int, int],
    stats: Tensor,
    dparameters: tuple[Tensor | None, Tensor | None],
) -> Tensor:
    """This process's sums as one partial (2, 1, C); dweight and dbias are written."""
    sums = partials.new_empty((2, 1, problem.channels))
    acc = _accumulator_name(problem)
    programs, constants = _vectors(
        problem.channels, tile, geometry[1] * geometry[2], acc, problem.wide
    )
    run(
        sums_kernel,
        programs,
        (partials, sums, stats, dparameters, problem.sizes, geometry),
        constants,
    )
    return sums


def interpreting() -> bool:
    """Whether the kernels run in Triton's interpreter, so that they take CPU tensors."""
    return not isinstance(forward_kernel, triton.JITFunction)
