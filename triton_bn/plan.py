"""Launch plans: which driver runs a problem, on which tiles. Pure functions of a problem and a device's facts.

Drivers
    resident: a program holds whole channels in registers; reads once, writes once.
    split: one launch for partial sums, a second that merges them in its prologue and transforms.
    streamed: both in one persistent launch, a window of columns at a time, so that the second reads
        from L2. Never picked by :func:`heuristic`: no measurement shows yet that it beats split.

The thresholds rest on what the compiler reports (registers, spills, access width), not on timings:
none was measured on a GPU yet. :func:`triton_bn.tuning.search.search` times what :func:`candidates` lists.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import product
from typing import Any, Literal

import torch

from triton_bn.problem import Problem, hash_once, without_hash

__all__ = [
    "DEVICES",
    "Candidates",
    "Device",
    "Plan",
    "Plans",
    "Tile",
    "candidates",
    "channel_blocks",
    "heuristic",
    "tile_channels",
    "with_source",
]


@dataclass(frozen=True)
class Device:
    """What a plan depends on. ``processors`` are SMs or compute units, ``cache`` the L2 in bytes."""

    name: str
    arch: str
    processors: int
    cache: int
    warp: int = 32

    __hash__ = hash_once
    __getstate__ = without_hash

    @staticmethod
    @functools.cache
    def current(device: torch.device) -> Device:
        """The facts of a torch device; asked of the driver once, at first use."""
        if device.type != "cuda":
            return DEVICES["interpreter"]
        facts = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            return Device(
                facts.name,
                facts.gcnArchName.split(":")[0],
                facts.multi_processor_count,
                facts.L2_cache_size,
                64,
            )
        arch = f"sm_{facts.major}{facts.minor}"
        return Device(facts.name, arch, facts.multi_processor_count, facts.L2_cache_size)

    @staticmethod
    def named(name: str) -> Device:
        """One of :data:`DEVICES` by its name (``"H100"``), or the first of an architecture (``"sm_90"``).

        Raises:
            ValueError: for a name that is none of them.
        """
        for known, device in DEVICES.items():
            if name.lower() in (known.lower(), device.arch):
                return device
        architectures = dict.fromkeys(device.arch for device in DEVICES.values())
        raise ValueError(
            f"expected one of {', '.join(DEVICES)}, or an architecture of "
            f"{', '.join(architectures)}, but got {name!r}"
        )

    def __str__(self) -> str:
        if self.arch == "interpreter":
            return "Triton's interpreter"
        return (
            f"{self.name} ({self.arch}), {self.processors} processors, "
            f"{self.cache / 2**20:g} MiB of L2"
        )


#: GPUs that plans and compile reports can be asked for without having one (vendors' data sheets). The
#: interpreter runs one program after another: as few as a small GPU would need.
DEVICES = {
    "interpreter": Device("interpreter", "interpreter", 4, 32 << 20),
    "A100": Device("NVIDIA A100", "sm_80", 108, 40 << 20),
    "H100": Device("NVIDIA H100", "sm_90", 132, 50 << 20),
    "H200": Device("NVIDIA H200", "sm_90", 132, 50 << 20),
    "B200": Device("NVIDIA B200", "sm_100", 148, 126 << 20),
    "MI300X": Device("AMD Instinct MI300X", "gfx942", 304, 4 << 20, 64),
}


@dataclass(frozen=True)
class Tile:
    """How one launch walks the canonical block: its programs, and what each holds at a time.

    A program takes ``columns`` adjacent values of a row and one of ``splits`` equal ranges of rows;
    it holds ``rows`` rows at a time, ``depth`` such tiles in flight. With 2 ``stages`` the next such chunk
    is copied to shared memory during the arithmetic on this one (a resident program has one chunk only).
    """

    rows: int
    columns: int
    depth: int = 1
    warps: int = 4
    splits: int = 1
    stages: int = 1

    __hash__ = hash_once
    __getstate__ = without_hash


@dataclass(frozen=True)
class Plan:
    """A driver and its tiles.

    ``reduce`` is the tile of split's first launch (``None`` where there is nothing to reduce),
    ``channels`` the whole channels of a resident program, whose tile covers all rows by its depth;
    a streamed plan has one tile for both phases (``reduce`` as well, for what needs one phase only),
    ``window`` blocks of columns and that many ``programs``.
    ``source`` says where the plan came from, ``reason`` by which threshold the heuristic chose it; neither
    takes part in comparisons.
    """

    driver: Literal["resident", "split", "streamed"]
    transform: Tile
    reduce: Tile | None = None
    channels: int = 0
    window: int = 0
    programs: int = 0
    source: str = field(default="heuristic", compare=False)
    reason: str = field(default="", compare=False)

    __hash__ = hash_once
    __getstate__ = without_hash

    @property
    def why(self) -> str:
        """Why this plan runs: what it was the fastest of, or the heuristic's threshold."""
        return SOURCES.get(self.source, self.reason)

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON-ready data, without its source and reason."""
        data = asdict(self)
        del data["source"], data["reason"]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any], source: str) -> Plan:
        """The inverse of :meth:`as_dict`.

        Raises:
            TypeError, KeyError: for data that is no plan.
        """
        data = dict(data)
        transform = Tile(**data.pop("transform"))
        reduce = data.pop("reduce")
        return cls(transform=transform, reduce=reduce and Tile(**reduce), source=source, **data)

    def __str__(self) -> str:
        def text(tile: Tile) -> str:
            return (
                f"{tile.depth} x [{tile.rows}, {tile.columns}], {tile.warps} warps"
                + (f", {tile.splits} splits" if tile.splits > 1 else "")
                + (f", {tile.stages} stages" if tile.stages > 1 else "")
            )

        if self.driver == "resident":
            body = f"{self.channels} channels a program, {text(self.transform)}"
        elif self.driver == "streamed":
            body = (
                f"{self.programs} programs, windows of {self.window} blocks, {text(self.transform)}"
            )
        elif self.reduce is None:
            body = f"transform {text(self.transform)}"
        else:
            body = f"reduce {text(self.reduce)}; transform {text(self.transform)}"
        return f"{self.driver}: {body} ({self.source})"


#: Why a plan runs that the heuristic did not choose, by its source.
SOURCES = {
    "disk": "the fastest of an earlier search on this GPU",
    "tuned now": "the fastest of a search by this process",
    "given": "given by triton_bn.use",
    "shipped": "the fastest of a search on such a GPU, in the table that comes with the package",
}


@dataclass(frozen=True)
class Plans:
    """What a layer's call launches, forward and backward: ``print`` it, or take it as rows.

    ``problems`` are the call as the kernels see it, forward and backward: sizes are those of the block
    ``[outer, channels, inner]`` (:mod:`triton_bn.problem`).
    """

    device: Device
    problems: tuple[Problem, Problem]
    forward: Plan
    backward: Plan

    def as_rows(self) -> list[dict[str, Any]]:
        """Two JSON-ready rows: device, problem, plan, where it came from, and why."""
        return [
            {
                "device": self.device.name,
                "arch": self.device.arch,
                "direction": problem.direction,
                "problem": str(problem),
                "plan": plan.as_dict(),
                "source": plan.source,
                "why": plan.why,
            }
            for problem, plan in zip(self.problems, (self.forward, self.backward), strict=True)
        ]

    def __str__(self) -> str:
        lines = [str(self.device)]
        for problem, plan in zip(self.problems, (self.forward, self.backward), strict=True):
            lines += [str(problem), f"  {plan}"] + ([f"  why: {plan.why}"] if plan.why else [])
        return "\n".join(lines)


@dataclass(frozen=True)
class Candidates:
    """What a layer's call may be launched by, forward and backward, the heuristic's plan first: ``print`` it."""

    device: Device
    problems: tuple[Problem, Problem]
    forward: tuple[Plan, ...]
    backward: tuple[Plan, ...]

    def __str__(self) -> str:
        lines = [str(self.device)]
        for problem, found in zip(self.problems, (self.forward, self.backward), strict=True):
            lines.append(f"{problem}: {len(found)} plans")
            for number, plan in enumerate(found):
                source = "candidate" if number else "heuristic"
                lines.append(f"  {number:3}  {replace(plan, source=source)}")
        return "\n".join(lines)


#: Values that a resident program holds without spilling, by direction: compiled for sm_80, sm_90,
#: sm_100 and gfx942 (backward holds x and dy). Half of it in float64.
RESIDENT = {"forward": 32 << 10, "backward": 16 << 10}

#: The same for one of its threads, and what of that may be one tile, whose values are widened all at once.
THREAD, WIDENED = 64, 16

#: Bytes of each input that a streamed window takes: a modelled L2 of 36 MB still held them at the second read.
WINDOW = {"forward": 6 << 20, "backward": 4 << 20}

#: Bytes of input that may lie between the two reads of a streamed value, by the same model.
HELD = 36 << 20

#: Tiles that a resident program loads by straight-line code; twice as many took minutes to compile.
DEPTH = 24

#: Columns times channels that a tile may have to be folded by, for each warp, before that spills.
MEMBERS = 1 << 10


#: Registers a thread of split's launches on tiles of 16-bit values, at most, by direction and by what a thread's
#: 8 columns of a tile are: of "one" channel, of "several" (then it holds what belongs to each column), or
#: channels each ("last"). Compiled for sm_90 with Triton 3.6 and 3.9; tests/test_compile.py holds it.
REGISTERS = {
    ("forward", "one"): 64,
    ("forward", "several"): 104,
    ("forward", "last"): 80,
    ("backward", "one"): 56,
    ("backward", "several"): 112,
    ("backward", "last"): 112,
}

#: 32-bit registers of a processor (NVIDIA), and programs that it holds more of than help.
FILE, MOST = 64 << 10, 8

#: Bytes of shared memory that the chunks under way may take: any NVIDIA GPU since the A100 has them.
SHARED = 96 << 10

#: Bytes of input for each processor below which it does not matter that some processors stay idle.
SHARE = 16 << 10


def power_of_two(n: int) -> int:
    """The smallest power of two that is no less than n."""
    return 1 << max(n - 1, 0).bit_length()


def tile_channels(columns: int, inner: int) -> int:
    """Channels that ``columns`` adjacent values of a row may touch, starting at a multiple of ``columns``."""
    if inner == 1 or columns % inner == 0:
        return columns // inner
    if inner % columns == 0:
        return 1
    return (columns + inner - 2) // inner + 1


def channel_blocks(columns: int, inner: int) -> int:
    """Blocks of ``columns`` adjacent values that one channel of ``inner`` values may touch."""
    if columns % inner == 0:
        return 1
    if inner % columns == 0:
        return inner // columns
    return (inner + columns - 2) // columns + 1


def aligned_channels(problem: Problem) -> int:
    """The fewest adjacent channels whose values fill whole 16-byte accesses and whole bytes of bits."""
    unit = 8 if problem.bits else 16 // problem.itemsize
    group = 1
    while group < unit and group * problem.inner % unit:
        group *= 2
    return group


def heuristic(problem: Problem, device: Device) -> Plan:
    """The plan for a problem that nobody has timed; its ``reason`` names the threshold that decided."""
    resident, reason = None, "statistics are given: a launch has nothing to wait for"
    if problem.training:
        resident = next(_resident(problem, device), None)
        reason = (
            f"whole channels of {problem.count:,} values, {aligned_channels(problem)} together, do not fit "
            f"into a resident program, which holds {_holds(problem)[0]:,} values at most"
        )
        if problem.cumulative:
            reason = "momentum=None: every program would need the counter that one of them advances"
    if resident is not None:
        size, share = problem.numel * problem.itemsize, device.processors * SHARE
        programs = -(-problem.channels // resident.channels)
        if size < share:
            reason = (
                f"{size:,} bytes are below {SHARE:,} a processor, where idle ones do not matter"
            )
            return replace(resident, reason=reason)
        keep = f"{programs:,} resident programs keep "
        if programs >= 0.9 * device.processors:
            return replace(resident, reason=f"{keep}90% of {device.processors} processors busy")
        reason = f"{keep}less than 90% of {device.processors} processors busy"
    # channels_last has few programs (below): they need more warps to keep as many bytes in flight. Where
    # there are fewer rows than tiles in flight, longer tiles make fewer partials.
    depth, stages = _depth(problem), _stages(problem, device)[0]
    usual = 8 if problem.inner == 1 or problem.outer < depth else 4
    plan = _split(problem, device, 1, depth, usual, stages)
    if (
        _turns(problem, device, plan.transform) > 1
        and _balance(problem, device, plan.transform) < 0.8
    ):
        # Larger programs leave fewer processors idle while the last ones run.
        other = _split(problem, device, 1, depth, 12 - usual, stages)
        plan = max(plan, other, key=lambda plan: _balance(problem, device, plan.transform))
    return replace(plan, reason=reason)


def candidates(problem: Problem, device: Device) -> tuple[Plan, ...]:
    """What a search may try, none of which runs out of registers, the heuristic's plan first."""
    plans = [heuristic(problem, device)]
    if problem.training:
        plans += _resident(problem, device)
    deepest = _depth(problem) * (1 if _curved(problem) else 2)
    usual, *others = _stages(problem, device)
    for scale, depth, warps in product((1, 2, 4), (1, 2, 4, 8), (4, 8, 16)):
        for stages in (usual, *others) if scale == 1 else (usual,):
            # With 16 warps and two stages ptxas spills, to have 64 registers.
            if depth <= deepest and warps * stages < 32:
                plans.append(_split(problem, device, scale, depth, warps, stages))
    plans += _streamed(problem, device)
    return tuple(dict.fromkeys(plans))


def _depth(problem: Problem) -> int:
    """Tiles in flight: 64 bytes a thread of each tensor that is read, 32 where two are or bits are packed.

    Half of that where ptxas would spill a few bytes: for mish, whose values take the most registers, and for
    slopes from x and a residual where a thread holds what belongs to several channels, or float64.
    """
    forward, act = problem.direction == "forward", problem.activation
    depth = 4 if forward and not problem.bits else 2
    several = problem.inner > 1 and problem.inner % 16 != 0
    full = _curved(problem) and problem.residual and (several or problem.dtype == torch.float64)
    if act is not None and ((forward and act.name == "mish") or full):
        depth //= 2
    return depth


def _stages(problem: Problem, device: Device) -> tuple[int, ...]:
    """Stages that a chunk loop may have, the usual first.

    From sm_90 on, two: then all loads of a chunk are under way before the first is waited for, and the loads of
    the next chunk during the arithmetic. sm_80 loses the hints for the caches by that, and nobody measured yet
    what weighs more; on AMD nothing changes. In channels_last the bits of the forward are packed from another
    layout, for which Triton reads (and computes) everything twice from shared memory.
    """
    family, _, version = device.arch.partition("_")
    if family != "sm":
        return (1,)
    double = problem.direction == "backward" and problem.dtype == torch.float64
    if double and problem.inner > 1 and problem.inner % 16:
        return (1,)  # two would spill
    packs = problem.direction == "forward" and problem.bits and problem.inner == 1
    return (2, 1) if int(version) >= 90 and not packs else (1, 2)


def _copied(problem: Problem, tile: Tile) -> int:
    """Bytes of shared memory that the chunks take which are under way while another is worked on."""
    tensors = (1 if problem.direction == "forward" else 2) + problem.residual + problem.output
    chunk = tile.rows * tile.columns * tile.depth * problem.itemsize
    return (tile.stages - 1) * tensors * chunk


def _curved(problem: Problem) -> bool:
    """Whether slopes are recomputed, which takes as many registers again as what is held."""
    act = problem.activation
    return problem.direction == "backward" and act is not None and not act.two_slopes


def _holds(problem: Problem) -> tuple[int, int]:
    """Values that a resident program holds without spilling, and one of its threads."""
    each = (2 if problem.dtype == torch.float64 else 1) * (2 if _curved(problem) else 1)
    return RESIDENT[problem.direction] // each, THREAD // each


def _resident(problem: Problem, device: Device) -> Iterator[Plan]:
    """Resident plans, the preferred first: the fewest channels that fill 16-byte accesses and 64-byte rows.

    In channels_last rows of 32 bytes (what memory hands out at a time) where longer ones do not fit, or leave
    processors idle.
    """
    if problem.cumulative:
        # Every program would need the counter that one of them advances: split has a launch between.
        return
    limit, thread = _holds(problem)
    widened = min(WIDENED, thread // 2)
    # The residual is held beside x: with 16 warps a thread has no registers for as many values again where they
    # are of 32 bits, or where each has an address of its own (channels_last, whose rows may lie anywhere).
    both = problem.direction == "forward" and problem.residual
    both = both and (problem.itemsize > 2 or problem.inner == 1)
    # Nor, in float64, for x and dy of several channels, whose sums it keeps apart.
    apart = problem.direction == "backward" and problem.dtype == torch.float64 and problem.inner > 1
    group = aligned_channels(problem)
    narrow = problem.inner == 1 and not _resident_fills(problem, device, limit)
    while (
        group * problem.inner * problem.itemsize < (32 if narrow else 64)
        and group < problem.channels
    ):
        group *= 2
    while True:
        channels = min(group, problem.channels)
        columns = max(power_of_two(channels * problem.inner), 8)
        members = 0 if problem.inner == 1 else columns * power_of_two(channels)
        if columns > limit:
            return
        held, fewest = problem.outer * columns, -(-members // MEMBERS)
        # Up to as many values a thread hide their loads behind one another best; beyond, the more warps.
        for most in sorted(
            (4, 8, 16), key=lambda w: w if held <= THREAD * w * device.warp else 32 - w
        ):
            tile = _resident_tile(problem, device, columns, most, fewest)
            threads = tile.warps * device.warp
            half = (both and tile.warps == 16) or (apart and channels > 1)
            most_held = min(limit, thread * threads) // (2 if half else 1)
            if (
                tile.rows * tile.depth * columns <= most_held
                and tile.rows * columns <= widened * threads
                and members <= MEMBERS * min(tile.warps, 8)
            ):
                yield Plan("resident", tile, channels=channels)
        if group >= problem.channels:
            return
        group *= 2


def _resident_fills(problem: Problem, device: Device, limit: int) -> bool:
    """Whether resident programs of 64-byte rows hold all rows of their channels, and keep the GPU busy."""
    channels = 64 // problem.itemsize
    return problem.outer * channels <= limit and problem.channels >= channels * device.processors


def _resident_tile(problem: Problem, device: Device, columns: int, most: int, fewest: int) -> Tile:
    """Tiles of about 16 bytes a thread, larger where more than DEPTH of them would be needed.

    It has the ``most`` warps, or, where those were too many for the values there are, down to the ``fewest``.
    """
    unit = device.warp * (16 // problem.itemsize)
    rows = min(max(most * unit // columns, 1), power_of_two(problem.outer))
    while -(-problem.outer // rows) > DEPTH:
        rows *= 2
    warps = max(min(most, rows * columns // unit), min(most, power_of_two(fewest)), 1)
    return Tile(rows, columns, -(-problem.outer // rows), warps)


def _kind(problem: Problem, columns: int) -> str:
    """What the columns of a thread are, see :data:`REGISTERS`."""
    if problem.inner == 1:
        return "last"
    return "one" if problem.inner % 16 == 0 or problem.inner % columns == 0 else "several"


def registers(problem: Problem, columns: int) -> int:
    """Registers a thread that split's launches on tiles of so many columns take, at most."""
    return REGISTERS[problem.direction, _kind(problem, columns)]


def _held(problem: Problem, device: Device, columns: int, warps: int) -> int:
    """Programs of split that a processor holds at a time, and that are worth holding."""
    if not device.arch.startswith("sm_"):
        return 2 if _kind(problem, columns) == "last" else MOST
    threads = warps * device.warp
    return max(min(FILE // (registers(problem, columns) * threads), MOST), 1)


def _turns(problem: Problem, device: Device, tile: Tile) -> float:
    """How many times over the programs of a launch fill the GPU."""
    programs = -(-problem.row // tile.columns) * tile.splits
    return programs / device.processors / _held(problem, device, tile.columns, tile.warps)


def _balance(problem: Problem, device: Device, tile: Tile) -> float:
    """The share of the time of more turns than one in which a processor is busy, its programs taking equally long."""
    turns = _turns(problem, device, tile)
    return turns / math.ceil(turns)


def _split(
    problem: Problem, device: Device, scale: int, depth: int, warps: int, stages: int
) -> Plan:
    """Split, or for running statistics the transform alone: ``scale`` times the usual number of programs."""
    tile = _tile(problem, device, scale, depth, warps, stages)
    reduces = problem.training or problem.direction == "backward"
    return Plan("split", tile, tile if reduces else None)


def _streamed(problem: Problem, device: Device) -> Iterator[Plan]:
    """Streamed plans: NVIDIA, a tensor that L2 cannot hold, windows that it can.

    In channels_last a window is at least 64 bytes of columns times all rows, so an input of many rows,
    such as (256, 256, 56, 56), has none. Nor has one whose channels are so large that L2 would have lost
    a value by the time of its second read: that waits for every window of its channel.
    """
    large = problem.numel * problem.itemsize > 2 * device.cache
    if not (device.arch.startswith("sm_") and problem.training and large) or problem.cumulative:
        return
    for depth, warps, resident in product((2, 4), (4, 8), (2, 4)):
        tile = _tile(
            problem, device, 1, depth, warps, 1
        )  # both phases, twice the stages: that spills
        window = WINDOW[problem.direction] // (problem.outer * tile.columns * problem.itemsize)
        window = min(window, -(-problem.row // tile.columns))
        programs = device.processors * resident
        if window == 0:
            return
        if streamed_span(problem, tile.columns, window) > HELD:
            continue
        # Two items a phase and program: with fewer, most would wait for the slowest.
        splits = _dealt(problem.outer, tile.rows * tile.depth, -(-2 * programs // window))
        tile = replace(tile, splits=splits)
        yield Plan("streamed", tile, tile, window=window, programs=programs)


def streamed_span(problem: Problem, columns: int, window: int) -> int:
    """Bytes of input that a streamed launch reads from a value's first read to its second, at most.

    The windows that a channel reaches ahead (one at least, see :mod:`triton_bn.kernels.streamed`) and
    the one that they follow are read before, and about one more meanwhile.
    """
    ahead = max(-(-(channel_blocks(columns, problem.inner) - 1) // window), 1)
    inputs = 1 if problem.direction == "forward" else 2
    return (ahead + 2) * window * columns * problem.outer * problem.itemsize * inputs


def _tile(
    problem: Problem, device: Device, scale: int, depth: int, warps: int, stages: int
) -> Tile:
    """16 bytes a thread and tile; rows are split until each processor has all the programs that it holds."""
    vector = 16 // problem.itemsize
    values = warps * device.warp * vector
    if problem.inner == 1:
        columns = 4 * vector  # rows of 64 bytes
    else:
        # Two channels a tile at most, where its rows are whole cache lines then: those fold with least ado.
        columns = max(power_of_two(problem.inner + 2) // 2, 128 // problem.itemsize)
        columns = min(columns, values)
        if power_of_two(problem.outer) < depth:
            # There are not so many rows to have in flight: longer ones, then.
            columns *= min(max(depth, 4) // power_of_two(problem.outer), 32 // vector)
            depth = power_of_two(problem.outer)
    columns = max(min(columns, power_of_two(problem.row)), 8)
    while problem.inner > 1 and columns * _members(problem, columns) > MEMBERS * warps:
        columns //= 2
    while (
        problem.inner == 1
        and columns > max(2 * vector, 8)
        and -(-problem.row // columns) * _most_splits(problem, columns) < device.processors
    ):
        columns //= 2
    while columns > values and -(-problem.row // columns) < device.processors:
        columns //= 2
    blocks = -(-problem.row // columns)
    rows = max(min(values // columns, power_of_two(problem.outer)), 1)
    programs = _held(problem, device, columns, warps) * device.processors * scale
    most = min(programs // blocks, _most_splits(problem, columns))
    splits = _dealt(problem.outer, rows * depth, most)
    # Fewer tiles in flight rather than fewer programs than processors.
    while depth > 1 and blocks * splits < device.processors:
        more = _dealt(problem.outer, rows * depth // 2, most)
        if more <= splits:
            break
        splits, depth = more, depth // 2
    tile = Tile(rows, columns, depth, warps, splits, stages)
    return tile if _copied(problem, tile) <= SHARED else replace(tile, stages=1)


def _dealt(outer: int, chunk: int, most: int) -> int:
    """Splits of which each has a row: chunks of rows are dealt out equally, and the last one gets what is left."""
    chunks = -(-outer // chunk)
    return -(-chunks // -(-chunks // max(most, 1)))


def _members(problem: Problem, columns: int) -> int:
    return power_of_two(tile_channels(columns, problem.inner))


def _most_splits(problem: Problem, columns: int) -> int:
    """The most splits whose partials, which each program of the second launch reads for its channels, are
    together no more than half of the input's bytes."""
    partials = channel_blocks(columns, problem.inner) * _members(problem, columns)
    return math.isqrt(columns * problem.outer * problem.itemsize // (16 * partials))


def with_source(plan: Plan, source: str) -> Plan:
    """The same plan, saying where it came from."""
    return replace(plan, source=source)
