"""What the compiler makes of the plans, for GPUs that need not be there.

Everything is compiled offline by :func:`triton_bn.inspection.report.compile_all`, in processes without
Triton's interpreter. sm_90 gets all layers of four networks, all activations and dtypes, and all
candidates of a problem of each driver; sm_80, sm_100 and gfx942 get a part of each. No kernel of
the networks may spill, nor any other with the Triton that is pinned (:data:`TRADED`).

A thread must move 16 bytes at a time wherever the layout allows it, that is where rows of x and of
what is dense start on 16 bytes: at every layer of the networks, whose channels are multiples of 8.
(An input of less than 16 KB a processor may rather be spread over more threads.)
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest
import torch
import triton
from torch.torch_version import TorchVersion

from perf.shapes import NETWORKS
from triton_bn import launch
from triton_bn.inspection import report
from triton_bn.inspection.report import TARGETS, Case, KernelFacts, gradient_of, plans
from triton_bn.plan import Plan, Tile, registers
from triton_bn.problem import ACTIVATIONS, Activation, Problem, describe

#: Beside other test processes, one compiles at a time.
JOBS = 1 if "PYTEST_XDIST_WORKER" in os.environ else None
OTHERS = ("sm_80", "sm_100", "gfx942")
WHOLE = ("x", "y", "dy", "dx", "residual", "dresidual")


def problem(
    shape: tuple[int, ...],
    layout: str = "contiguous",
    dtype: torch.dtype = torch.bfloat16,
    *,
    training: bool = True,
    activation: str | None = None,
    residual: bool = False,
    cumulative: bool = False,
) -> Problem:
    x = torch.empty(shape, dtype=dtype, device="meta")
    if layout == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    elif layout == "sliced":  # the first half of the channels
        x = torch.cat([x, x], 1)[:, : shape[1]]
    elif layout == "misaligned":
        x = torch.empty(x.numel() + 1, dtype=dtype, device="meta")[1:].view(shape)
    act = Activation.of(activation)
    return describe(
        x,
        training=training,
        residual=residual,
        activation=act,
        bits=act is not None and act.two_slopes and (residual or not training),
        cumulative=cumulative,
    )[0]


def both(*problems: Problem) -> list[Problem]:
    """Forward and backward."""
    return [p for forward in problems for p in (forward, gradient_of(forward))]


def chosen(problems: Iterable[Problem], target: str) -> list[Case]:
    """The heuristic's plans."""
    return [case for p in problems for case in plans(p, target, search=False)]


#: Bytes a thread that ptxas may spill though there are more registers to take: now and then it trades a
#: few, once a program, for more programs at a time. For which plan that pays is what a search measures.
TRADED = 0 if TorchVersion(triton.__version__) >= "3.9" else 16


def runs_out(target: str, kernel: KernelFacts) -> bool:
    """Whether it spills for want of registers."""
    free = target.startswith("sm_") and kernel.registers < min(255, 2048 // kernel.warps)
    return kernel.spilled > (TRADED if free else 0)


def complaints(case: Case, kernel: KernelFacts, strict: bool) -> list[str]:
    problem, _, target = case
    found = []
    if kernel.spilled if strict else runs_out(target, kernel):
        found.append(f"spills {kernel.spilled} bytes at {kernel.registers} registers")
    processors = TARGETS[target].device.processors
    if problem.numel * problem.itemsize >= processors * 16 << 10:
        if kernel.programs < 0.9 * min(processors, 148):
            found.append(f"{kernel.programs} programs")
        if problem.vector * problem.itemsize == 16:
            for name, size in [*kernel.loads.items(), *kernel.stores.items()]:
                if name in WHOLE and size < 16:
                    found.append(f"{size}-byte accesses to {name}")
    return found


def assert_sound(cases: Sequence[Case], *, strict: bool = False) -> None:
    """``strict``: without a byte spilled, whatever the Triton."""
    bad = [
        f"{case.target} {case.problem}, {case.plan}: {kernel.kernel}: {text}"
        for case, facts in zip(cases, compiled(cases), strict=True)
        for kernel in facts
        for text in complaints(case, kernel, strict)
    ]
    assert not bad, f"{len(bad)} complaints:\n" + "\n".join(bad)


def compiled(cases: Sequence[Case]) -> list[tuple[KernelFacts, ...]]:
    return report.compile_all(cases, jobs=JOBS, instructions=False)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_plans_of_networks(layout: str) -> None:
    layers = {
        problem((batch, layer.channels, *layer.spatial), layout)
        for network in ("ResNet-50", "MobileNetV3", "EfficientNet-B0", "DenseNet-121")
        for layer in NETWORKS[network]
        for batch in (1, 32, 256)
    }
    assert_sound(chosen(both(*layers), "sm_90"), strict=True)


def test_the_plans_of_resnet_50_elsewhere() -> None:
    layers = [
        problem((32, layer.channels, *layer.spatial), layout)
        for layer in NETWORKS["ResNet-50"][1::2]
        for layout in ("contiguous", "channels_last")
    ]
    cases = [case for target in OTHERS for case in chosen(both(*layers), target)]
    assert_sound(cases, strict=True)


def test_the_assembly_of_networks() -> None:
    """sm_90, both layouts, with ReLU and with a residual: what the time of split's kernels hangs on.

    All loads of a chunk are under way before the first is waited for, and none of them behind a store. The
    merge of partials has no barrier in its loop. A launch fits the registers that plans count on.
    """
    layers = [(32, 256, 56, 56), (256, 512, 28, 28), (256, 256, 14, 14), (256, 2048, 7, 7)]
    problems = both(
        *(
            problem(shape, layout, activation="relu", residual=residual)
            for shape in layers
            for layout in ("contiguous", "channels_last")
            for residual in (False, True)
        )
    )
    cases = [case for case in chosen(problems, "sm_90") if case.plan.driver == "split"]
    assert len(cases) == len(problems)
    bad = []
    for case, facts in zip(cases, report.compile_all(cases, jobs=JOBS), strict=True):
        allowed = registers(case.problem, case.plan.transform.columns)
        for kernel in facts:
            assert kernel.flight is not None
            assert kernel.barriers is not None
            loads, together, behind = kernel.flight
            name = f"{case.problem}, {case.plan}: {kernel.kernel}"
            if together < loads or behind:
                bad.append(f"{name}: {together} of {loads} loads together, {behind} behind a store")
            if kernel.barriers[1]:
                bad.append(f"{name}: {kernel.barriers[1]} barriers in the loop of a merge")
            if kernel.registers > allowed:
                bad.append(f"{name}: {kernel.registers} registers, {allowed} in the table")
    assert not bad, f"{len(bad)}:\n" + "\n".join(bad)


def test_activations_of_straight_pieces_select_nothing() -> None:
    """A maximum or minimum each, by which NaN stays NaN and -0.0 becomes 0.0 (PTX: +0.0 > -0.0)."""
    script = """
import json
from dataclasses import replace
from triton_bn.inspection import report
from triton_bn.plan import Plan, Tile
from tests.test_compile import problem
plan = Plan("split", Tile(64, 32, 4, 8))
for name in ("relu", "relu6", "leaky_relu", "hardswish"):
    case = problem((64, 256, 28, 28), "channels_last", training=False, activation=name)
    with report._capture("sm_90") as launches:
        report._run(replace(case, bits=False), plan)
    ptx = launches[0].compiled.asm["ptx"]
    print(json.dumps([name, ptx.count("max.NaN.f32"), ptx.count("selp.b16"), ptx.count("max.f32")]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [name for name, *_ in found] == ["relu", "relu6", "leaky_relu", "hardswish"]
    for name, maxima, selects, others in found:
        assert maxima > 0, name
        assert selects == others == 0, name


#: One of each kind of problem that has code of its own in the kernels.
KINDS = [
    problem((32, 256, 14, 14), activation="relu", residual=True),
    problem((32, 256, 28, 28), "channels_last", activation="gelu", residual=True),
    problem((64, 64, 28, 28), "channels_last", torch.float64),
    problem((32, 256, 56, 56), training=False, activation="relu"),
    problem((1024, 256, 112, 112), "channels_last"),  # over 2**31 values
    problem((64, 256, 28, 28), "sliced", torch.float16),
    problem((32, 64, 28, 28), "misaligned"),
    problem((32, 96, 28, 28), dtype=torch.float32, cumulative=True),
    problem((17, 13, 7, 5)),
    problem((100_000, 32)),
    problem((1000, 300)),
    problem((1, 64, 512, 512)),
]


def test_problems_of_every_kind() -> None:
    assert_sound(
        chosen(both(*KINDS), "sm_90")
        + [case for target in OTHERS for case in chosen(both(*KINDS[:5]), target)]
    )


def test_every_activation() -> None:
    """Slopes kept as bits, told by the output, or recomputed from x and the residual."""
    split = [problem((64, 256, 56, 56), activation=name, residual=True) for name in ACTIVATIONS]
    resident = [
        problem((32, 256, 14, 14), activation=name, residual=True)
        for name in ("mish", "tanh", "relu")
    ]
    split += [replace(each, bits=False) for each in split if each.bits]
    resident[-1] = replace(resident[-1], bits=False)
    assert_sound(chosen(both(*split, *resident), "sm_90"))


def test_every_candidate() -> None:
    """Of a middle layer and of a large input."""
    problems = both(problem((32, 256, 14, 14)), problem((256, 256, 56, 56)))
    cases = {}
    for case in [case for p in problems for case in plans(p, "sm_90")]:
        plan = case.plan  # what differs in splits only is the same kernel
        cases[case.problem, plan.driver, plan.channels, replace(plan.transform, splits=1)] = case
    assert {(key[0].direction, key[1]) for key in cases} == {
        (direction, driver)
        for direction in ("forward", "backward")
        for driver in ("resident", "split", "streamed")
    }
    bad = [
        f"{case.problem}, {case.plan}: {kernel.kernel} spills {kernel.spilled} bytes at "
        f"{kernel.registers} registers"
        for case, facts in zip(cases.values(), compiled([*cases.values()]), strict=True)
        for kernel in facts
        if runs_out(case.target, kernel)
    ]
    assert not bad, "\n".join(bad)


class Bomb:
    """A plan of which whoever reads it dies, as of a compiler's crash."""

    def __init__(self, plan: Plan) -> None:
        self.driver, self.transform = plan.driver, plan.transform

    def __reduce__(self) -> object:
        return os._exit, (9,)


def test_a_compiler_that_dies_costs_one_plan() -> None:
    """The cases have one tile, so that one process is to compile them all: another goes on."""
    one = problem((32, 64, 14, 14))
    case = plans(one, "sm_90", search=False)[0]
    refused = case._replace(target="sm_1")
    cases = [case, case._replace(plan=Bomb(case.plan)), case, refused]
    answers = dict(report.compile_each(cases, jobs=1, instructions=False))
    assert answers[1] == "the compiler died (9)"
    assert answers[0] == answers[2] == report.compile_all([case], instructions=False)[0]
    assert "KeyError" in answers[3]
    with pytest.raises(RuntimeError, match=f"sm_90, {re.escape(str(one))}.*the compiler died"):
        report.compile_all(cases[:3], jobs=1, instructions=False)


# ---- the report itself ----


def test_the_report_sees_spills_narrow_accesses_and_every_tensor() -> None:
    """Of plans that are made to be bad."""
    held = Plan("resident", Tile(8, 1024, 8, 4), channels=1)
    misaligned = problem((64, 64, 28, 28), "misaligned")
    added = problem((64, 64, 28, 28), activation="relu", residual=True)
    split = Plan("split", Tile(1, 1024, 2, 4, 8), Tile(1, 1024, 2, 4, 8))
    cases = [
        Case(problem((64, 64, 28, 28)), held, "sm_90"),
        Case(misaligned, split, "sm_90"),
        Case(added, split, "gfx942"),
        Case(gradient_of(added), split, "gfx942"),
    ]
    (spilling,), narrow, forward, backward = report.compile_all(cases, jobs=1)
    assert spilling.spilled > 0
    assert narrow[0].loads["x"] == 2
    assert narrow[1].stores["y"] == 2
    assert [kernel.kernel for kernel in forward] == ["moments_kernel", "normalize_kernel"]
    assert {"x", "residual"} <= set(forward[1].loads)
    assert {"y", "bits"} <= set(forward[1].stores)
    assert {"x", "dy", "bits"} <= set(backward[1].loads)
    assert {"dx", "dresidual"} <= set(backward[1].stores)
    size, bits = added.numel * added.itemsize, added.numel // 8
    assert [kernel.moved for kernel in forward] == [size, 3 * size + bits]
    assert [kernel.moved for kernel in backward] == [2 * size + bits, 4 * size + bits]
    assert report.floor(added) == 3 * size + bits
    assert report.floor(gradient_of(added)) == 4 * size + bits
    # A value takes a part of an access, a conversion, and its arithmetic.
    for kernel in (spilling, *narrow, *forward, *backward):
        assert kernel.instructions is not None
        assert 3 < kernel.instructions < 60


def test_programs_a_processor() -> None:
    """By registers, by shared memory, by warp slots."""
    h100, mi300 = TARGETS["sm_90"], TARGETS["gfx942"]
    assert h100.programs(4, 32, 0) == 16
    assert h100.programs(4, 64, 0) == 8
    assert h100.programs(8, 128, 0) == 2
    assert h100.programs(32, 64, 0) == 1
    assert h100.programs(4, 32, 56 << 10) == 4
    assert mi300.programs(4, 64, 0) == 8
    assert mi300.programs(4, 128, 0) == 4


@pytest.mark.skipif(not launch.interpreting(), reason="kernels are compiled here")
def test_compile_says_that_interpreted_kernels_do_not_compile() -> None:
    case = plans(problem((32, 64, 14, 14)), "sm_90", search=False)[0]
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        report.compile(*case)


def test_a_case_that_does_not_compile_is_named() -> None:
    bad = Plan("resident", Tile(3, 8), channels=1)  # no power of two
    with pytest.raises(
        RuntimeError, match=r"sm_90, forward training 2x3x4 float32.*CompilationError"
    ):
        report.compile_all([Case(problem((2, 3, 4), dtype=torch.float32), bad, "sm_90")])


def test_inspect_prints_rows_whatever_triton_interpret_says() -> None:
    command = [sys.executable, "-m", "triton_bn", "inspect", "32x64x14x14", "--json"]
    options = [
        "--plans",
        "heuristic",
        "--direction",
        "forward",
        "--device",
        "H200",
        "--device",
        "sm_80",
    ]
    done = subprocess.run(
        [*command, *options, "--no-instructions"],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    rows = json.loads(done.stdout)
    assert {row["target"] for row in rows} == {"sm_90", "sm_80"}
    for row in rows:
        assert row["problem"] == "forward training 32x64x196 bfloat16"
        assert row["passes"] >= row["floor_passes"] == 2
        assert row["registers"] > 16
        assert row["spilled"] == 0
        assert row["instructions"] is None
    assert "forward_kernel" in report.table(rows) or "moments_kernel" in report.table(rows)
