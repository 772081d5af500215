"""What the compiler makes of a plan, without a GPU: what ``python -m triton_bn inspect`` shows.

:func:`compile` runs a verb of :mod:`triton_bn.launch` on tensors without memory, under a driver
that names a target and launches nothing. So the very kernels that a launch would run are compiled,
with the very specialization, and :mod:`triton_bn.inspection.binary` reads what came out.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from triton_bn import launch
from triton_bn.inspection import binary
from triton_bn.plan import DEVICES, Device, Plan, candidates, heuristic
from triton_bn.problem import Problem, describe, gradient_of

__all__ = [
    "RESNET50",
    "TARGETS",
    "Case",
    "KernelFacts",
    "Target",
    "compile",
    "compile_all",
    "compile_each",
    "floor",
    "gradient_of",
    "plans",
    "rows",
    "table",
]

#: Inputs (C, H, W) of ResNet-50's batch norms at 224 x 224, and how many layers have each.
RESNET50 = (
    (64, 112, 112, 1),
    (64, 56, 56, 6),
    (256, 56, 56, 4),
    (128, 56, 56, 1),
    (128, 28, 28, 7),
    (512, 28, 28, 5),
    (256, 28, 28, 1),
    (256, 14, 14, 11),
    (1024, 14, 14, 7),
    (512, 14, 14, 1),
    (512, 7, 7, 5),
    (2048, 7, 7, 4),
)


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and what one of its processors offers (vendors' manuals).

    A processor has four schedulers, each with 512 registers of 32 bits a lane.
    """

    gpu: GPUTarget
    device: Device
    #: Warps that a scheduler can hold.
    warps: int
    #: Bytes of shared memory, and those that each program takes of it beside its own.
    shared: int
    reserved: int = 0

    def programs(self, warps: int, registers: int, shared: int) -> int:
        """Programs of this size that a processor holds at a time."""
        held = 4 * min(self.warps, 512 // max(-(-registers // 8) * 8, 8))
        return min(held // warps, 32, self.shared // max(shared + self.reserved, 1))


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), DEVICES["A100"], 16, 164 << 10, 1 << 10),
    "sm_90": Target(GPUTarget("cuda", 90, 32), DEVICES["H100"], 16, 228 << 10, 1 << 10),
    "sm_100": Target(GPUTarget("cuda", 100, 32), DEVICES["B200"], 16, 228 << 10, 1 << 10),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), DEVICES["MI300X"], 8, 64 << 10),
}


@dataclass(frozen=True)
class KernelFacts:
    """One launch of a plan, as compiled."""

    kernel: str
    programs: int
    warps: int
    #: 32-bit registers a thread.
    registers: int
    #: Bytes a thread of local memory, where registers are spilled.
    spilled: int
    #: Bytes a program of shared memory.
    shared: int
    #: Programs that a processor holds at a time.
    resident: int
    #: The share of a processor's warp slots that they fill.
    occupancy: float
    #: How many times over the launch fills the GPU: of 1.2 waves the last fifth leaves most of it idle.
    waves: float
    #: Bytes of an access, by tensor: of those accesses that move most of it.
    loads: Mapping[str, int]
    stores: Mapping[str, int]
    #: Bytes of the tensors of the input's size (packed bits included) that are read or written.
    moved: int
    #: Machine instructions a value in the loop over tiles, or in a whole program without a loop;
    #: ``None``, like all that follows, where nobody asked.
    instructions: float | None
    #: Machine instructions outside of that loop.
    fixed: int | None = None
    #: Loads of whole tensors in the loop, or in a program without one; those under way before the first is
    #: waited for; and those that stand behind a store, so that they wait for all that comes before it.
    flight: tuple[int, int, int] | None = None
    #: Barriers in the loop over tiles, in other loops (the merge of partials), and outside.
    barriers: tuple[int, int, int] | None = None
    #: Whether the loads keep their hints for the caches; ``None`` for AMD too.
    hints: bool | None = None


class Case(NamedTuple):
    """A plan for a problem, to be compiled for one of :data:`TARGETS`."""

    problem: Problem
    plan: Plan
    target: str


# ---- problems ----


def floor(problem: Problem) -> int:
    """The bytes that any plan must read and write; those of vectors of C values are left out."""
    tensors = 2 + problem.residual + problem.output
    if problem.direction == "backward":
        tensors += 1 + _stores_residual(problem)
    bits = problem.outer * -(-problem.row // 8) if problem.bits else 0
    return tensors * problem.numel * problem.itemsize + bits


def _stores_residual(problem: Problem) -> bool:
    """Whether backward writes the residual's gradient; without an activation that is dy itself.

    In training, slopes are kept as bits only where there is a residual.
    """
    return problem.residual or problem.output or (problem.bits and problem.training)


def plans(problem: Problem, target: str, *, search: bool = True) -> list[Case]:
    """Every plan that a search may try on a target, or the heuristic's alone."""
    device = TARGETS[target].device
    found = candidates(problem, device) if search else (heuristic(problem, device),)
    return [Case(problem, plan, target) for plan in found]


# ---- compilation ----


class _Launch(NamedTuple):
    kernel: str
    programs: int
    tensors: dict[str, Tensor]
    constants: dict[str, Any]
    compiled: Any


class _Driver:
    """Stands in for the driver of a GPU: says what to compile for."""

    def __init__(self, target: str) -> None:
        self.target = TARGETS[target].gpu
        # Kernels are cached by the device's number: one for each target, and no real device's.
        self.device = 1000 + list(TARGETS).index(target)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


@contextmanager
def _capture(target: str) -> Iterator[list[_Launch]]:
    """Meanwhile, what :mod:`triton_bn.launch` would launch is compiled instead, and listed."""
    driver, run = triton.runtime.driver, launch.run
    try:
        before = driver.active
    except RuntimeError:  # no GPU: whoever asks next shall hear so again
        before = None
    launches: list[_Launch] = []

    def warmup(wanted: launch.Launch, given: Any, arguments: Any) -> None:
        kernel, constants, programs = wanted.kernel, wanted.constants, wanted.programs
        compiled = kernel.warmup(*arguments, *wanted.statics, **constants, grid=(programs,))
        tensors = dict(_tensors(kernel.arg_names, arguments))
        launches.append(_Launch(kernel.__name__, programs, tensors, constants, compiled))

    driver.set_active(_Driver(target))
    launch.run = warmup
    try:
        yield launches
    finally:
        launch.run = run
        driver.set_active(before)


def _tensors(names: Sequence[str], arguments: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    """The tensors among a kernel's arguments, in their order, each by the name of its pointer."""
    for name, value in zip(names, arguments, strict=False):
        if isinstance(value, Tensor):
            yield name.removeprefix("p_"), value
        elif isinstance(value, tuple):
            yield from _tensors([f"{name}[{i}]" for i in range(len(value))], value)


def compile(
    problem: Problem, plan: Plan, target: str, *, instructions: bool = True
) -> tuple[KernelFacts, ...]:
    """Compiles what a plan launches, and reads the facts of each kernel.

    Parameters and running statistics are float32 (float64 beside float64), and all gradients are
    wanted.

    Args:
        target: one of :data:`TARGETS`.
        instructions: whether to disassemble, which for NVIDIA takes about as long as to compile.

    Raises:
        RuntimeError: where the kernels were decorated for Triton's interpreter, because
            TRITON_INTERPRET was set when the package was imported. :func:`compile_all` is for that.
    """
    if launch.interpreting():
        raise RuntimeError(
            "these kernels were decorated for Triton's interpreter, which compiles nothing: "
            "unset TRITON_INTERPRET before triton_bn is imported, or use compile_all"
        )
    with _capture(target) as launches:
        _run(problem, plan)
    return tuple(_facts(entry, problem, target, instructions) for entry in launches)


def _run(problem: Problem, plan: Plan) -> None:
    x = _input(problem)
    like = torch.empty_like(x)
    vector = torch.empty(problem.channels, dtype=launch.accumulator(problem), device="meta")
    tracked = torch.empty((), dtype=torch.int64, device="meta")
    residual = like if problem.residual or problem.output else None
    affine = vector, vector
    taking: launch.Taking = launch.ALL
    if problem.masked:
        mask = torch.empty(problem.outer, problem.inner, dtype=torch.uint8, device="meta")
        taking = mask, tracked.new_empty(2) if problem.training else None
    if problem.direction == "backward":
        bits = None
        if problem.bits:
            pitch = -(-problem.row // 8)
            bits = torch.empty(problem.outer, pitch, dtype=torch.uint8, device="meta")
        needs = (True, True, True, _stores_residual(problem))
        stats = torch.empty(2 + problem.masked, problem.channels, dtype=vector.dtype, device="meta")
        taking = taking[0], stats[2] if taking[1] is not None else None
        launch.backward(
            problem, plan, like, x, stats, *affine, residual, bits, needs, taking=taking
        )
    elif problem.training:
        momentum = None if problem.cumulative else 0.1
        running = vector, vector, tracked
        launch.forward(problem, plan, x, *affine, *running, residual, momentum, 1e-5, taking)
    else:
        launch.normalize(problem, plan, x, vector, vector, *affine, residual, 1e-5, taking=taking)


def _input(problem: Problem) -> Tensor:
    """The input [outer, channels, inner] without memory, at an address as the problem's."""

    def view(offset: int) -> Tensor:
        reach = sum((n - 1) * s for n, s in zip(problem.sizes, problem.strides, strict=True)) + 1
        memory = torch.empty(offset + reach, dtype=problem.dtype, device="meta")
        return memory.as_strided(problem.sizes, problem.strides, offset)

    x = view(0)
    aligned = describe(x, training=problem.training)[0].vector == problem.vector
    return x if aligned else view(problem.vector)


#: Tensors of the input's size, and the bits that stand for one.
_WHOLE = frozenset({"x", "y", "dy", "dx", "residual", "dresidual", "bits"})


def _facts(entry: _Launch, problem: Problem, name: str, instructions: bool) -> KernelFacts:
    target = TARGETS[name]
    warps, shared = entry.constants["num_warps"], entry.compiled.metadata.shared
    registers, spilled = binary.resources(entry.compiled)
    loads, stores = binary.accesses(entry.compiled, tuple(entry.tensors))
    whole = [entry.tensors[name] for name in (*loads, *stores) if name in _WHOLE]
    moved = sum(tensor.numel() * tensor.element_size() for tensor in whole)
    resident = target.programs(warps, registers, shared)
    facts = KernelFacts(
        kernel=entry.kernel,
        programs=entry.programs,
        warps=warps,
        registers=registers,
        spilled=spilled,
        shared=shared,
        resident=resident,
        occupancy=resident * warps / (4 * target.warps),
        waves=entry.programs / (max(resident, 1) * target.device.processors),
        loads=loads,
        stores=stores,
        moved=moved,
        instructions=None,
    )
    if not instructions:
        return facts
    widths = frozenset(size for name, size in loads.items() if name in _WHOLE)
    code = binary.instructions(entry.compiled, widths)
    return replace(
        facts,
        instructions=_each(entry, code, moved / problem.numel, problem, target),
        fixed=code.program - code.loop,
        flight=(code.loads, code.together, code.behind),
        barriers=code.barriers,
        hints=binary.hinted(entry.compiled),
    )


def _each(
    entry: _Launch, code: binary.Instructions, size: float, problem: Problem, target: Target
) -> float:
    """Machine instructions a value, of which each moves ``size`` bytes."""
    threads = entry.constants["num_warps"] * target.gpu.warp_size
    if not code.loop:
        return float(code.program * threads * entry.programs / problem.numel)
    tile = entry.constants["T"]
    # Of a tile that is smaller than the program, several threads hold the same values.
    return float(code.loop / (code.moved / size) * max(threads / (tile.R * tile.K), 1))


# ---- many at once ----


def compile_all(
    cases: Sequence[Case], *, jobs: int | None = None, instructions: bool = True
) -> list[tuple[KernelFacts, ...]]:
    """:func:`compile` for each case, in fresh processes without TRITON_INTERPRET.

    Args:
        jobs: as :func:`compile_each` takes it.

    Raises:
        RuntimeError: for a case that does not compile, in the compiler's words.
    """
    results: dict[int, tuple[KernelFacts, ...]] = {}
    with closing(compile_each(cases, jobs=jobs, instructions=instructions)) as answers:
        for i, answer in answers:
            if isinstance(answer, str):
                problem, plan, target = cases[i]
                raise RuntimeError(f"{target}, {problem}, {plan}: {answer}")
            results[i] = answer
    return [results[i] for i in range(len(cases))]


def compile_each(
    cases: Sequence[Case], *, jobs: int | None = None, instructions: bool = True
) -> Generator[tuple[int, tuple[KernelFacts, ...] | str], None, None]:
    """:func:`compile` for each case, in fresh processes without TRITON_INTERPRET, as they are done.

    To close the generator ends the processes. What they compiled stays in Triton's cache on disk, where a
    launch on such a GPU finds it.

    Args:
        jobs: how many processes; as many as CPUs by default. Cases whose tiles are the same go to
            the same one, which compiles the kernels that they share only once.

    Yields:
        The case's index, and its facts, or why it did not compile: in the compiler's words, or that the
        process died of it.
    """
    groups: dict[Any, list[int]] = {}
    for i, case in enumerate(cases):
        tile = replace(case.plan.transform, splits=1)
        key = case.target, case.plan.driver, tile, case.problem.dtype, case.problem.direction
        groups.setdefault(key, []).append(i)
    queue, answers = deque(groups.values()), SimpleQueue[tuple[int, Any]]()
    processes: list[subprocess.Popen[bytes]] = []
    closed = False

    def work() -> None:
        process: subprocess.Popen[bytes] | None = None
        while not closed:
            try:
                group = queue.popleft()
            except IndexError:
                break
            if process is None:
                process = _worker()
                processes.append(process)
            done = 0
            try:
                for i in group:
                    done += 1
                    answers.put((i, _ask(process, cases[i], instructions)))
            except (EOFError, OSError, pickle.UnpicklingError):
                with suppress(subprocess.TimeoutExpired):
                    process.wait(1)  # for its own exit code
                _end(process)
                # It died of the last one asked for. The others are for the next process.
                answers.put((group[done - 1], f"the compiler died ({process.returncode})"))
                if group[done:]:
                    queue.appendleft(group[done:])
                process = None
        if process is not None:
            _end(process)

    jobs = max(min(jobs or os.cpu_count() or 1, len(groups)), 1)
    with ThreadPoolExecutor(jobs) as pool:
        try:
            workers = [pool.submit(work) for _ in range(jobs)]
            for _ in cases:
                while answers.empty() and not all(worker.done() for worker in workers):
                    time.sleep(0.002)
                if answers.empty():
                    break  # a worker could not even be started
                yield answers.get()
            for worker in workers:
                worker.result()
        finally:
            closed = True
            queue.clear()
            for process in processes:
                process.kill()


def _worker() -> subprocess.Popen[bytes]:
    """A process that compiles (:func:`_serve`)."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[2])
    paths = filter(None, [root, environment.get("PYTHONPATH", "")])
    environment["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, "-c", "from triton_bn.inspection import report; report._serve()"]
    # In the folder of this very package: the current one comes first where Python looks.
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=root
    )


def _end(process: subprocess.Popen[bytes]) -> None:
    """It holds nothing that is still wanted."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with suppress(OSError):  # a request that nobody will read
            pipe.close()  # type: ignore[union-attr]
    process.wait()


def _ask(process: subprocess.Popen[bytes], case: Case, instructions: bool) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    pickle.dump((case, instructions), process.stdin)
    process.stdin.flush()
    return pickle.load(process.stdout)


def _serve() -> None:
    """The loop of a process of :func:`compile_each`: cases come by stdin, answers go by stdout."""
    requests, answers = os.fdopen(0, "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a compiler prints must not get among the answers
    while True:
        try:
            case, instructions = pickle.load(requests)
        except EOFError:
            return
        pickle.dump(_answer(case, instructions), answers)
        answers.flush()


def _answer(case: Case, instructions: bool) -> tuple[KernelFacts, ...] | str:
    try:
        return compile(*case, instructions=instructions)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# ---- the report ----


def rows(cases: Sequence[Case], facts: Sequence[Sequence[KernelFacts]]) -> list[dict[str, Any]]:
    """One JSON-ready row a launch, for tables and plots: problem, plan, tile, and the facts."""
    found = []
    for (problem, plan, target), kernels in zip(cases, facts, strict=True):
        size = problem.numel * problem.itemsize
        for i, kernel in enumerate(kernels):
            last = i + 1 == len(kernels)
            found.append(
                {
                    "target": target,
                    "problem": str(problem),
                    "plan": str(plan),
                    "driver": plan.driver,
                    "tile": asdict(plan.transform if last else plan.reduce or plan.transform),
                    **vars(kernel),
                    "passes": sum(kernel.moved for kernel in kernels) / size,
                    "floor_passes": floor(problem) / size,
                    "floor_bytes": floor(problem),
                }
            )
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows for a person: a block a problem and target, in it a block a plan."""
    lines: list[str] = []
    block, plan = None, None
    for row in rows:
        if (row["target"], row["problem"]) != block:
            block, plan = (row["target"], row["problem"]), None
            lines += [
                "",
                f"{row['target']}: {row['problem']}; at least {row['floor_passes']:.2f} passes, "
                f"{row['floor_bytes']:,} bytes",
                f"    {'':22} {'':8} {'':5} {'':9} {'bytes':>7} {'bytes':>6}  a pro-{'':6} "
                "instructions  barriers   loads  hints bytes an access",
                f"    {'kernel':22} programs warps registers spilled shared cessor waves "
                "a value fixed          together  kept loads → stores",
            ]
        if row["plan"] != plan:
            plan = row["plan"]
            lines.append(f"  {plan}: {row['passes']:.2f} passes")
        lines.append(
            f"    {row['kernel']:22} {row['programs']:8} {row['warps']:5} {row['registers']:9} "
            f"{row['spilled']:7} {row['shared']:6} {row['resident']:6} {row['waves']:5.2f} "
            f"{_code(row)} {_widths(row['loads'])} → {_widths(row['stores'])}"
        )
    if any(row["instructions"] is not None for row in rows):
        lines += ["", _LEGEND]
    return "\n".join(lines[1:])


_LEGEND = """\
instructions: a value, in the loop over tiles or (a program without one) in all; and outside of that loop
barriers: in the loop over tiles + in other loops + outside
loads together: of whole tensors, before the first wait / all in the loop or program; "behind n": behind a store
hints kept: whether the loads still say which values to keep in the caches"""


def _code(row: Mapping[str, Any]) -> str:
    """What was read off the machine code, if it was."""
    if row["instructions"] is None:
        return f"{'':38}"
    loads, together, behind = row["flight"]
    flight = f"{together}/{loads}" + (f" behind {behind}" if behind else "")
    hints = {True: "yes", False: "no", None: "-"}[row["hints"]]
    barriers = "+".join(map(str, row["barriers"]))
    return f"{row['instructions']:7.1f} {row['fixed']:5} {barriers:>8} {flight:>9} {hints:>5}"


def _widths(accesses: Mapping[str, int]) -> str:
    """Of whole tensors; vectors of C values would only hide them."""
    return ", ".join(f"{name} {size}" for name, size in accesses.items() if name in _WHOLE) or "-"
