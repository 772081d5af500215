"""The benchmark suite without a GPU: fake clocks and time, real providers on small CPU tensors."""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from interleave import Deadlock, interleaved
from torch import Tensor, nn

pytest.importorskip("pandas", reason="needs the perf extra")
pytest.importorskip("matplotlib", reason="needs the perf extra")

from perf import (
    ab,
    gate,
    networks,
    plots,
    providers,
    pytest_visit,
    runner,
    search,
    subjects,
    summary,
    visit,
    wait,
)
from perf.__main__ import main
from perf.cases import NETWORKS, OPS, TRAIN, Case, select
from perf.clocks import Call, DeviceClock
from perf.commands import cpu, memory
from perf.kept import kept_bytes
from perf.networks import UNet
from perf.providers import COPY, Provider, Unsupported
from perf.runner import COLUMNS, Lab, Results, Row, measure
from perf.runner import run_cases as run
from triton_bn import launch, route
from triton_bn.plan import DEVICES, Device, Plan, candidates, heuristic
from triton_bn.problem import Problem
from triton_bn.tuning.results import Result, Timing
from triton_bn.tuning.results import Row as Timed

TORCH, OURS = "torch native", "triton_bn"


@dataclass
class FakeClock:
    """Gives each call the milliseconds of its provider, while time passes; the first round runs."""

    ms: dict[str, float]
    now: float = 0.0
    rounds: list[list[str]] = field(default_factory=list)

    def round(self, calls: Sequence[Call]) -> list[float]:
        for call in () if self.rounds else calls:
            with call.inside():
                call.run(call.prepare())
        self.rounds.append([call.provider for call in calls])
        times = [self.ms.get(call.provider, 3.0) for call in calls]
        self.now += sum(times) / 1e3
        return times


def of_name(*names: str) -> list[Provider]:
    return [provider for provider in providers.PROVIDERS if provider.name in names]


def lab_of(clock: FakeClock, *others: Provider, **options: Any) -> Lab:
    """Torch, torch in our name (the interpreter is slow), and others."""
    chosen = [*of_name(TORCH), Provider(OURS, providers.stock), *others]
    options = {"seconds": 0.0, "fewest": 3, "most": 5, **options}
    now, device = lambda: clock.now, torch.device("cpu")
    return Lab(device, chosen, lambda measure, device: clock, now=now, **options)


def lab_with_ours(*forced: str) -> Lab:
    return replace(lab_of(FakeClock({})), providers=of_name(TORCH, OURS, *forced))


CASE = Case("test", (4, 6, 5, 3), "contiguous", "float32", "bn", TRAIN)


def by_provider(rows: Sequence[Row], measure: str = "forward") -> dict[str, Row]:
    return {row["provider"]: row for row in rows if row["measure"] == measure}


# ---- Cases ---------------------------------------------------------------------------------------


def test_the_most_telling_cases_come_first_and_every_case_once() -> None:
    cases = select()
    first = cases[:24]
    assert {(case.network, case.dtype, case.measures) for case in first} == {
        ("ResNet-50", "bfloat16", TRAIN)
    }
    assert len({case.shape for case in first}) == 4
    for op in OPS:
        assert {case.layout for case in first if case.op == op} == {"contiguous", "channels_last"}
    assert {measure for case in cases[24:30] for measure in case.measures} == {"memory", "host"}
    assert [case.measures for case in cases[-2:]] == [("step",), ("compiled step",)]
    assert len({(case.key, case.measures) for case in cases}) == len(cases)


def test_cases_cover_networks_dtypes_batches_and_what_is_fused() -> None:
    cases = select()
    assert {case.network for case in cases} >= {
        "ResNet-50", "MobileNetV3", "EfficientNet-B0", "DenseNet-121", "U-Net 3d", "MLP", "tiny",
    }  # fmt: skip
    assert {case.dtype for case in cases} == {"bfloat16", "float16", "float32"}
    assert {case.op for case in cases} == {*OPS, "model"}
    batches = {case.shape[0] for case in cases if case.network == "ResNet-50"}
    assert {1, 2, 4, 8, 16, 32, 64, 128, 256} <= batches
    chosen = select(["ResNet-50", "256x256x56x56", "channels_last", "eval"])
    assert chosen
    assert all("eval" in case.measures and case.shape == (256, 256, 56, 56) for case in chosen)


@pytest.mark.parametrize(
    ("op", "measure", "tensors"),
    [
        ("bn", "forward", 2),
        ("bn+relu", "eval", 2),
        ("bn", "backward", 3),
        ("bn+add+relu", "forward", 3),
        ("bn+add+relu", "backward", 4),
        ("bn+add+relu", "forward+backward", 7),
        ("bn", "host", 0),
    ],
)
def test_bytes_are_those_of_each_tensor_read_or_written_once(
    op: str, measure: str, tensors: int
) -> None:
    case = replace(CASE, op=op, dtype="bfloat16")
    assert case.bytes(measure) == tensors * 4 * 6 * 5 * 3 * 2


# ---- The gate ------------------------------------------------------------------------------------


def given_and_results(case: Case) -> tuple[gate.Before, dict[str, Any]]:
    """What torch computes for a case."""
    torch.manual_seed(0)
    before, layer = subjects._given(case, torch.device("cpu"))
    norm = providers.stock(layer, case, before.x)
    y = norm(before.x, before.residual)
    results: dict[str, Any] = {"y": y.detach()}
    if case.training:
        inputs = [before.x, layer.weight, layer.bias]
        inputs += [] if before.residual is None else [before.residual]
        names = ("dx", "dweight", "dbias", "dresidual")
        results |= zip(names, torch.autograd.grad(y, inputs, before.dy), strict=False)
        results |= {"running_mean": layer.running_mean, "running_var": layer.running_var}
    return before, results


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("measures", [TRAIN, ("eval",)])
def test_torch_passes_the_gate(dtype: str, op: str, measures: tuple[str, ...]) -> None:
    for shape, layout in (((16, 24, 7, 9), "channels_last"), ((33, 5), "contiguous")):
        case = Case("test", shape, layout, dtype, op, measures)
        assert gate.judge(case, *given_and_results(case)) == ""


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "one value off": lambda t: t.clone().index_fill_(-1, torch.tensor(0), 1e3),
    "half a percent off": lambda t: t * 1.005,
    "not a number": lambda t: t.clone().index_fill_(-1, torch.tensor(0), torch.nan),
    "another shape": lambda t: t[:1] if t.dim() > 1 else t[:0],
    "missing": lambda t: None,
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize(
    "name", ["y", "dx", "dweight", "dbias", "dresidual", "running_mean", "running_var"]
)
def test_the_gate_keeps_out_each_wrong_result(
    name: str, wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "CHUNK", 1000)  # several chunks of channels
    case = replace(CASE, op="bn+add+relu", shape=(16, 6, 5, 9))
    before, results = given_and_results(case)
    assert gate.judge(case, before, results) == ""
    results[name] = WRONG[wrong](results[name])
    assert gate.judge(case, before, results).startswith(name)


def test_the_gate_knows_a_variance_from_squares() -> None:
    """E[x²] − E[x]² of data far from zero is the classic mistake."""
    case = replace(CASE, shape=(64, 2, 8, 8))
    before, results = given_and_results(case)
    with torch.no_grad():
        before.x.add_(300)
        mean = before.x.mean((0, 2, 3), keepdim=True)
        variance = before.x.square().mean((0, 2, 3), keepdim=True) - mean.square()
        y = (before.x - mean) * (variance + before.eps).rsqrt() * before.weight.view(1, -1, 1, 1)
    results["y"] = y + before.bias.view(1, -1, 1, 1)
    assert gate.judge(case, before, results).startswith("y: ")


# ---- One case ------------------------------------------------------------------------------------


def forgets_eps(layer: Any, case: Case, x: Tensor) -> providers.Norm:
    layer.eps = 0.1
    return providers.stock(layer, case, x)


def fails(layer: Any, case: Case, x: Tensor) -> providers.Norm:
    raise ValueError("no such kernel\nand a long story")


def cannot(layer: Any, case: Case, x: Tensor) -> providers.Norm:
    raise Unsupported


def overwrites(layer: Any, case: Case, x: Tensor) -> providers.Norm:
    return providers.followed(lambda x: x.copy_(layer(x.clone())), case)


def test_a_row_holds_median_spread_bandwidth_and_share_of_the_copy() -> None:
    clock = FakeClock({COPY: 0.5, OURS: 1.0, TORCH: 2.0})
    rows = measure(CASE, lab_of(clock))
    assert {row["measure"] for row in rows} == set(TRAIN)
    ours = by_provider(rows)[OURS]
    assert set(ours) == set(COLUMNS)
    assert (ours["status"], ours["ms"], ours["p20_ms"], ours["p80_ms"]) == ("measured", 1, 1, 1)
    assert ours["n"] == 3
    assert ours["bytes"] == 2 * 4 * 6 * 5 * 3 * 4
    assert ours["gb_per_s"] == pytest.approx(ours["bytes"] / 1e-3 / 1e9)
    assert ours["share_of_copy"] == pytest.approx(0.5)
    assert by_provider(rows)[COPY]["share_of_copy"] == 1
    assert by_provider(rows)[TORCH]["torch"] == torch.__version__
    assert all(ours[name] for name in ("gpu", "triton", "triton_bn", "fingerprint", "time"))


def test_all_providers_of_a_case_are_timed_in_turn() -> None:
    clock = FakeClock({})
    measure(replace(CASE, measures=("forward",)), lab_of(clock, seconds=1.0, most=4))
    assert all(sorted(names) == sorted([COPY, OURS, TORCH]) for names in clock.rounds)
    assert len(clock.rounds) == 2 + 4  # two to warm up
    assert len({tuple(names) for names in clock.rounds}) == 3  # each comes first once


def test_rounds_end_with_the_time_of_a_measure() -> None:
    clock = FakeClock({COPY: 5.0, OURS: 5.0, TORCH: 10.0})  # 20 ms a round
    lab = lab_of(clock, seconds=0.1, most=100)
    rows = measure(replace(CASE, measures=("forward",)), lab)
    assert by_provider(rows)[OURS]["n"] == 5


def test_who_fails_the_gate_is_not_timed() -> None:
    wrong = Provider("wrong", forgets_eps)
    clock = FakeClock({})
    row = by_provider(measure(CASE, lab_of(clock, wrong)))["wrong"]
    assert row["status"] == "failed the gate"
    assert row["detail"].startswith("y: ")
    assert row["ms"] is None
    assert row["gb_per_s"] is None
    assert all("wrong" not in names for names in clock.rounds)


def test_an_error_costs_a_provider_its_row_only() -> None:
    others = Provider("broken", fails), Provider("picky", cannot)
    rows = by_provider(measure(CASE, lab_of(FakeClock({}), *others)))
    assert rows["broken"]["status"] == "error"
    assert rows["broken"]["detail"] == "ValueError: no such kernel"
    assert "picky" not in rows
    assert rows[OURS]["status"] == rows[TORCH]["status"] == "measured"


def test_a_provider_that_is_not_installed_has_no_row() -> None:
    missing = Provider("missing", providers.stock, module="no_such_module_anywhere")
    assert "missing" not in by_provider(measure(CASE, lab_of(FakeClock({}), missing)))


class _Attorch(nn.BatchNorm2d):
    """The interface of attorch's layers: the activation by name, the residual as a second input."""

    def __init__(self, num_features: int, *, act_func: str | None, device: Any) -> None:
        super().__init__(num_features, device=device)
        self.act_func = act_func

    def forward(self, input: Tensor, pre_act_add: Tensor | None = None) -> Tensor:
        y = super().forward(input)
        y = y if pre_act_add is None else y + pre_act_add
        return y.relu() if self.act_func == "relu" else y


def _gems(x: Tensor, weight: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return torch.native_batch_norm(x, weight, bias, *rest)


@pytest.mark.parametrize("op", OPS)
def test_other_projects_are_called_as_they_are_today(
    op: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attorch, gems = ModuleType("attorch"), ModuleType("flag_gems")
    attorch.BatchNorm2d = _Attorch  # type: ignore[attr-defined]
    gems.__version__ = "5.0"  # type: ignore[attr-defined]
    gems.batch_norm = _gems  # type: ignore[attr-defined]
    gems.batch_norm_backward = torch.ops.aten.native_batch_norm_backward  # type: ignore[attr-defined]
    for module in (attorch, gems):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    lab = lab_of(FakeClock({}), *of_name("attorch", "flag_gems"))
    rows = by_provider(measure(replace(CASE, op=op), lab))
    assert {rows[name]["status"] for name in ("attorch", "flag_gems")} == {"measured"}
    assert rows["flag_gems"]["provider_version"] == "5.0"
    assert rows["attorch"]["provider_version"] == "unknown"


def test_the_network_whose_step_is_timed_has_the_batch_norms_of_resnet_50() -> None:
    with torch.device("meta"):
        model = subjects.network("ResNet-50")
    found: Counter[tuple[int, ...]] = Counter()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, inputs: found.update([inputs[0].shape[1:]]))
    y = model(torch.empty(2, 3, 224, 224, device="meta"))
    assert y.shape == (2, 1000)
    assert sum(parameter.numel() for parameter in model.parameters()) == 25_557_032
    expected = {(each.channels, *each.spatial): each.multiplicity for each in NETWORKS["ResNet-50"]}
    assert found == expected


def test_a_provider_may_overwrite_its_input() -> None:
    in_place = Provider("in place", overwrites, in_place=True)
    rows = measure(CASE, lab_of(FakeClock({}), in_place))
    assert {row["status"] for row in rows if row["provider"] == "in place"} == {"measured"}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_ours_passes_for_all_that_is_fused(op: str, layout: str) -> None:
    for dtype in ("float32", "bfloat16"):
        for measures in (("forward+backward",), ("eval",)):
            case = Case("test", (3, 4, 2, 3), layout, dtype, op, measures)
            row = by_provider(measure(case, lab_with_ours()), measures[0])[OURS]
            assert (row["status"], row["detail"]) == ("measured", "")


@pytest.mark.skipif(
    not launch.interpreting(), reason="CPU tensors meet no plan but in the interpreter"
)
def test_a_driver_is_forced_and_named_where_it_is_not_the_usual_one() -> None:
    case = replace(CASE, measures=("forward",))
    rows = by_provider(measure(case, lab_with_ours("triton_bn resident", "triton_bn split")))
    assert rows[OURS]["plan"].startswith("forward resident: ")
    assert "backward resident: " in rows[OURS]["plan"]
    assert rows["triton_bn split"]["plan"].startswith("forward split: ")
    assert "triton_bn resident" not in rows


def test_memory_counts_what_is_kept_for_backward() -> None:
    tensor = 4 * 8 * 5 * 6 * 4
    for op, theirs in (("bn", 1), ("bn+relu", 2), ("bn+add+relu", 2)):
        case = replace(CASE, shape=(4, 8, 5, 6), op=op, measures=("memory",))
        rows = by_provider(measure(case, lab_with_ours()), "memory")
        assert COPY not in rows
        ours = tensor * (2 if op == "bn+add+relu" else 1)  # x; and y
        vectors = 10 * 8 * 4
        assert ours <= rows[OURS]["kept_bytes"] <= ours + vectors
        assert theirs * tensor <= rows[TORCH]["kept_bytes"] <= theirs * tensor + vectors


def squares(layer: Any, case: Case, x: Tensor) -> providers.Norm:
    return providers.followed(lambda x: layer(x) + 0 * (x * x), case)


def test_cpu_prints_ratios_of_what_agrees_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(route, "on_gpu", lambda x: False)
    monkeypatch.setattr(cpu, "INTERPRETED", False)
    monkeypatch.setattr(cpu, "SHAPES", ((2, 3, 4, 4),))
    assert main(["cpu", "--rounds", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 24 + 1
    assert all(float(ratio) > 0 for line in lines[2:-1] for ratio in line.split()[-2:])
    monkeypatch.setattr(cpu, "INTERPRETED", True)
    assert main(["cpu"]) == 2


def test_memory_that_is_kept_twice_counts_once() -> None:
    case = replace(CASE, measures=("memory",))
    lab = lab_of(FakeClock({}), Provider("squares", squares))
    rows = by_provider(measure(case, lab), "memory")
    assert rows["squares"]["kept_bytes"] == rows[TORCH]["kept_bytes"]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(8, 1000)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.relu(self.bn(self.conv(x))).mean((2, 3)))
        return y


def spoiled(model: nn.Module) -> nn.Module:
    model.get_submodule("bn").eps = 1.0  # type: ignore[assignment]
    return model


def test_a_network_must_be_as_near_to_float64_as_torch_is() -> None:
    step = Case("any", (8, 3, 12, 12), "channels_last", "bfloat16", "model", ("step",))
    chosen = [*of_name(OURS, "torch"), Provider("spoiled", network=spoiled)]
    clock = FakeClock({})
    lab = replace(lab_of(clock, networks=lambda name: Network()), providers=chosen)
    rows = by_provider(measure(step, lab), "step")
    assert rows[OURS]["status"] == rows["torch"]["status"] == "measured"
    assert rows[OURS]["ms"] == 3.0
    assert rows["spoiled"]["status"] == "failed the gate"
    assert rows["spoiled"]["ms"] is None


# ---- All cases -----------------------------------------------------------------------------------

SHAPES = ((4, 6, 5, 3), (2, 3, 4, 4), (9, 2, 2, 2), (3, 5, 4, 2))
CASES = [replace(CASE, shape=shape, measures=("forward", "backward")) for shape in SHAPES]


def measured(results: Results) -> list[str]:
    return [*dict.fromkeys(row["shape"] for row in results.rows)]


def names(*indices: int) -> list[str]:
    return ["x".join(map(str, SHAPES[index])) for index in indices]


def test_a_budget_takes_the_first_cases_and_the_next_run_goes_on(tmp_path: Path) -> None:
    clock = FakeClock({COPY: 50.0, OURS: 50.0, TORCH: 100.0})  # 2 s a case: 2 measures x 5 rounds
    lab, said = lab_of(clock), []
    assert run(CASES, Results(tmp_path), lab, budget=3.0, say=said.append) == 2
    assert measured(Results(tmp_path)) == names(0, 1)
    assert "2 cases left" in said[-1]
    assert run(CASES, Results(tmp_path), lab, budget=1.0) == 1
    assert measured(Results(tmp_path)) == names(0, 1, 2)
    assert run(CASES, Results(tmp_path), lab) == 1
    assert run(CASES, Results(tmp_path), lab) == 0
    assert run(CASES[:1], Results(tmp_path), lab, again=True) == 1
    assert len(Results(tmp_path).rows) == len(CASES) * 2 * 3


def test_a_change_of_code_or_gpu_measures_again_in_place_of_the_old(tmp_path: Path) -> None:
    clock = FakeClock({})
    lab = lab_of(clock)
    run(CASES[:2], Results(tmp_path), lab)
    lab.about["fingerprint"] = "another"
    clock.ms[OURS] = 7.0
    assert run(CASES[:1], Results(tmp_path), lab) == 1
    rows = [row for row in Results(tmp_path).rows if row["provider"] == OURS]
    assert sorted((row["shape"], row["ms"]) for row in rows) == sorted(
        [(name, ms) for name, ms in zip(names(0, 1), (7.0, 3.0), strict=True) for _ in range(2)]
    )


def test_json_and_csv_hold_the_same_rows(tmp_path: Path) -> None:
    run(CASES[:2], Results(tmp_path), lab_of(FakeClock({}), Provider("wrong", forgets_eps)))
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.csv"}
    rows = json.loads((tmp_path / "bench.json").read_text())["rows"]
    with (tmp_path / "bench.csv").open(newline="") as file:
        table = [*csv.DictReader(file)]
    assert [*table[0]] == [*COLUMNS]
    assert len(table) == len(rows) == 2 * 2 * 4
    for line, row in zip(table, rows, strict=True):
        assert line == {name: "" if row[name] is None else str(row[name]) for name in COLUMNS}


def test_a_case_that_breaks_the_gpu_is_noted_and_not_met_again(tmp_path: Path) -> None:
    def breaks(layer: Any, case: Case, x: Tensor) -> providers.Norm:
        if x.shape == SHAPES[1]:
            raise torch.AcceleratorError("an illegal memory access was encountered")
        return providers.stock(layer, case, x)

    lab = lab_of(FakeClock({}), Provider("breaks", breaks))
    with pytest.raises(torch.AcceleratorError):
        run(CASES, Results(tmp_path), lab)
    assert run(CASES, Results(tmp_path), lab) == 2
    rows = [row for row in Results(tmp_path).rows if row["shape"] == names(1)[0]]
    assert {(row["provider"], row["status"]) for row in rows} == {("all", "error")}


def test_a_case_too_large_is_noted_and_costs_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = subjects._given

    def small(case: Case, device: torch.device) -> Any:
        if case.shape == SHAPES[0]:
            raise torch.OutOfMemoryError("out of memory")
        return given(case, device)

    monkeypatch.setattr(subjects, "_given", small)
    assert run(CASES, Results(tmp_path), lab_of(FakeClock({}))) == len(CASES)
    statuses = {row["shape"]: row["status"] for row in Results(tmp_path).rows}
    assert [*statuses.values()] == ["error", "measured", "measured", "measured"]


def test_cases_are_compiled_a_window_ahead(tmp_path: Path) -> None:
    windows: list[list[Case]] = []
    ahead = lambda cases: windows.append([*cases])  # noqa: E731
    run(CASES, Results(tmp_path), lab_of(FakeClock({})), ahead=ahead, window=3)
    assert windows == [CASES[:3], CASES[3:]]


# ---- Searches ------------------------------------------------------------------------------------


class Inline:
    """An executor that runs nothing: there is no GPU to compile for."""

    def submit(self, *work: Any) -> Any:
        return self

    def exception(self) -> None:
        return None


def fake_result(problem: Problem, device: Device, **options: Any) -> Result:
    """A table as a search would make it, one kind of candidate failed and one stopped early."""
    rows = []
    for index, plan in enumerate(candidates(problem, device)):
        ms = 0.02 + 0.001 * (index * 7 % 13)
        status = "stopped early" if index == 2 else "timed"
        timing = Timing(ms, 0.99 * ms, 1.02 * ms, 20)
        if (plan.transform.depth, plan.transform.warps) == (1, 16):
            status, timing = "failed: no kernel", None
        rows.append(Timed(plan, status, timing))
    return Result(problem, device, tuple(rows), complete=True)


def test_a_search_takes_the_telling_problems_within_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, device, tuned = [0.0], DEVICES["H200"], set[Problem]()

    def one(problem: Problem, device: Device, **options: Any) -> Result:
        now[0] += 4.0
        tuned.add(problem)
        return fake_result(problem, device)

    def resolve(problem: Problem, device: Device) -> Plan:
        plan = heuristic(problem, device)
        return replace(plan, source="disk") if problem in tuned else plan

    monkeypatch.setattr(search, "search_one", one)
    monkeypatch.setattr(search, "resolve", resolve)
    monkeypatch.setattr(search, "export_table", lambda path, device: path.write_text("{}"))
    cases = select(["ResNet-50", "bn", "bfloat16", "forward"])
    wanted = [*search.problems(cases)][:5]
    assert [problem.direction for problem in wanted[:2]] == ["forward", "backward"]
    options: Any = {"budget": 10.0, "pool": Inline(), "now": lambda: now[0]}
    assert search.search(cases, Results(tmp_path), device, **options) == 3
    assert tuned == set(wanted[:3])
    assert (tmp_path / "plans.json").exists()
    assert search.search(cases, Results(tmp_path), device, **{**options, "budget": 5.0}) == 2
    assert tuned == set(wanted)
    kept = {row["problem"] for row in Results(tmp_path).search}
    assert kept == {str(problem) for problem in wanted}


# ---- Pictures and targets ------------------------------------------------------------------------

#: Milliseconds as a multiple of the copy's.
FACTORS = {
    COPY: 1.0, OURS: 1.1, "triton_bn split": 1.4, TORCH: 2.2, "torch cuDNN": 1.8,
    "torch.compile": 1.6, "unheard of": 3.0,
}  # fmt: skip


def fake_rows(lab: Lab) -> list[Row]:
    """Rows as of a whole visit, every time a multiple of the copy's."""
    rows = []
    for case in (*select(["ResNet-50", "bfloat16"]), *select(["host"])):
        for name in case.measures:
            for provider, factor in FACTORS.items():
                if case.op == "model" or (provider == "torch cuDNN" and case.residual):
                    continue
                kept = {OURS: 1.5 if case.residual else 1.0, TORCH: 2.0}.get(provider)
                if name == "host" and provider == COPY:
                    continue
                tensor = case.bytes("forward") // (3 if case.residual else 2)
                subject = subjects.Subject(provider, plan="forward resident: a; backward split: b")
                if name == "memory":
                    subject.facts = {"kept_bytes": kept and kept * tensor}
                    rows.append(runner._row(case, name, subject, lab))
                    continue
                copy = 0.004 + case.bytes(name) / 3e9
                times = [copy * factor * jitter for jitter in (0.98, 1.0, 1.0, 1.0, 1.05)]
                rows.append(runner._row(case, name, subject, lab, times, copy))
    for step, times in zip(
        select(["model"]),
        ({"torch": 60.0, OURS: 45.0}, {"torch": 61.0, "torch.compile": 50.0}),
        strict=True,
    ):
        for provider, ms in times.items():
            subject = subjects.Subject(provider)
            rows.append(runner._row(step, step.measures[0], subject, lab, [ms] * 5))
    for case in select(["channel sweep"]):
        for name in case.measures:
            for provider, factor in FACTORS.items():
                copy = 0.002 + case.bytes(name) / 3e9
                subject = subjects.Subject(provider)
                rows.append(runner._row(case, name, subject, lab, [copy * factor] * 3, copy))
    for question in ab.QUESTIONS:
        for case in question.cases:
            for name in case.measures:
                for number, provider in enumerate(question.providers):
                    ms = [(0.01 + case.bytes(name) / 3e9) * (1 + 0.1 * number)] * 3
                    rows.append(
                        runner._row(case, name, subjects.Subject(provider.name), lab, ms, ms[0])
                    )
    return rows


def fake_waits() -> list[Row]:
    return [
        {
            "gang": gang, "gangs": 1, "a_processor": a_processor, "status": "measured",
            "us": 1 + 0.1 * a_processor + gang / 100, "least_us": 1.0, "most_us": 4.0,
            "gpu": "No GPU (made for a test)", "torch": "0", "triton": "0",
        }
        for a_processor in wait.A_PROCESSOR
        for gang in wait.GANGS
    ]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of results of a GPU that does not exist."""
    lab = lab_of(FakeClock({}))
    lab.about["gpu"] = "No GPU (made for a test)"
    results = Results(tmp_path / "no_gpu")
    results.rows, results.waits = fake_rows(lab), fake_waits()
    for problem in [*search.problems(select(["ResNet-50", "32x512x28x28"]))][:4]:
        results.search += fake_result(problem, DEVICES["H200"]).as_rows()
    results.save()
    return results.folder


def compiled_facts() -> list[dict[str, Any]]:
    """Rows as ``python -m triton_bn inspect --json`` prints them, one of them spilling."""
    problem, *_ = search.problems(select(["ResNet-50", "32x512x28x28"]))
    return [
        {
            "target": "sm_90", "problem": str(problem), "plan": str(plan), "driver": plan.driver,
            "tile": vars(plan.transform), "kernel": "forward_kernel", "warps": plan.transform.warps,
            "registers": 32 + 8 * (index % 20), "spilled": 8 * (index == 3), "occupancy": 0.5,
        }
        for index, plan in enumerate(candidates(problem, DEVICES["H200"]))
    ]  # fmt: skip


def test_pictures_are_drawn_from_the_data_by_one_command(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "inspect.json").write_text(json.dumps(compiled_facts()))
    assert main(["plots", "--results", str(folder.parent)]) == 0
    pictures = {path.stem: path for path in folder.glob("*.png")}
    assert set(pictures) == {*plots.PLOTS, "compile"}
    assert set(capsys.readouterr().out.split()) == {str(path) for path in pictures.values()}
    for path in pictures.values():
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert 10_000 < len(data) < 1 << 20


def test_what_whole_networks_keep_is_counted_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(route, "on_gpu", lambda x: False)
    monkeypatch.setitem(networks.NETWORKS, "U-Net", lambda: UNet(4, 2))
    arguments = ["--batch", "1", "--size", "32", "--network", "U-Net", "--results", str(tmp_path)]
    assert main(["memory", *arguments]) == 0
    rows = json.loads((tmp_path / "kept.json").read_text())
    share = {row["way"]: row["share"] for row in rows}
    assert list(share) == list(memory.WAYS)
    assert share["recompute"] < 0.7 < share["converted"] == 1
    assert share["torch.utils.checkpoint"] < 1
    assert "U-Net" in capsys.readouterr().out
    assert [path.name for path in plots.draw(tmp_path)] == ["kept.png"]
    assert {"recompute", "U-Net"} <= texts(plots.kept(plots.pd.DataFrame(rows)))
    plots.plt.close("all")


def test_bytes_kept_are_those_that_are_still_there() -> None:
    kept = torch.randn(100).requires_grad_()
    layers = nn.Sequential(nn.Flatten(0), nn.Sigmoid(), nn.Tanh())
    assert kept_bytes(layers, kept)[0] == 400  # Sigmoid's output; Tanh's is the network's own


def texts(figure: Any) -> set[str]:
    found = figure.findobj(lambda artist: hasattr(artist, "get_text") and artist.get_visible())
    return {artist.get_text() for artist in found}


def test_pictures_show_what_they_are_about(folder: Path) -> None:
    data = plots.load(folder)
    shown = {name: texts(plot(data)) for name, plot in plots.PLOTS.items()}
    for name, text in shown.items():
        assert any("No GPU (made for a test)" in line or "H200" in line for line in text), name
    everyone = {OURS, TORCH, "torch cuDNN", "torch.compile", "unheard of"}
    for name in ("bandwidth", "scaling", "channels", "size"):
        assert everyone <= shown[name], name
    assert "a copy of the\nsame bytes" in shown["bandwidth"]
    assert f"{1.8 / 1.1:.2f}" in shown["speedup"]  # eager is the faster of native and cuDNN
    assert any("1024×14×14" in line for line in shown["scaling"])
    assert any("32 × C × 14×14" in line for line in shown["channels"])
    assert {"failed", "best", "heuristic"} <= shown["landscape"]
    assert {"1.00", "1.50", "2.00"} <= shown["memory"]
    assert "not measured" in shown["host"]
    assert any("512x784" in line for line in shown["tuned"])
    assert {"60.0 ms, 2133 images/s", "50.0 ms, 2560 images/s"} <= shown["step"]
    assert {f"{name}: time / that of “{first}”" for name, first in (
        ("stages", "1 stage"), ("streamed", "split"), ("waves", "depth 1"),
    )} <= shown["comparisons"]  # fmt: skip
    assert {"1 a processor", "4 a processor"} <= shown["waits"]
    assert "not timings" in "".join(
        texts(plots.compile_facts(plots.pd.DataFrame(compiled_facts())))
    )
    plots.plt.close("all")


def test_what_tuning_bought_is_the_heuristics_time_over_the_best(folder: Path) -> None:
    data = plots.load(folder)
    shown = texts(plots.tuned(data))
    timed = data.search[data.search["status"] == "timed"]
    for _, rows in timed.groupby("problem"):
        gain = rows[rows["heuristic"]]["median_ms"].min() / rows["median_ms"].min()
        assert f"{gain:.2f}" in shown
    plots.plt.close("all")


def test_the_best_plan_and_the_heuristics_are_framed_where_they_are(folder: Path) -> None:
    data = plots.load(folder)
    figure = plots.landscape(data)
    axis = figure.axes[0]
    rows = plots._cells(data.search.rename(columns=lambda name: name.removeprefix("transform_")))
    rows = rows[rows["problem"] == axis.get_title(loc="left")]
    names, warps = plots._axes_of(rows)
    for name, style in plots.FRAMES.items():
        (row,) = [row for _, row in rows[rows[name]].iterrows()]
        (frame,) = [
            patch
            for patch in axis.patches
            if plots.matplotlib.colors.same_color(patch.get_edgecolor(), style["ec"])
        ]
        x, y = frame.get_center()
        assert (round(x), round(y)) == (warps.index(row["warps"]), names.index(row["cell"]))
    plots.plt.close("all")


@pytest.mark.parametrize("name", ["bandwidth", "scaling", "channels", "size"])
def test_a_legend_of_many_providers_lies_inside_its_picture_and_off_the_axes(
    name: str, folder: Path
) -> None:
    data = plots.load(folder)
    more = [
        data.rows[data.rows["provider"] == OURS].assign(provider=f"a provider of {n} words")
        for n in range(4)
    ]
    figure = plots.PLOTS[name](replace(data, rows=plots.pd.concat([data.rows, *more])))
    figure.canvas.draw()
    (legend,) = figure.legends
    assert len(legend.get_texts()) >= 9
    box, page = legend.get_window_extent(), figure.bbox
    assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
    assert not any(box.overlaps(a.get_tightbbox()) for a in figure.axes if a.get_visible())
    assert not box.overlaps(figure._suptitle.get_window_extent())
    plots.plt.close("all")


def test_nothing_is_drawn_without_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plots", "--results", str(tmp_path)]) == 1
    assert "no GPU was measured yet" in capsys.readouterr().out
    assert main(["summary", "--results", str(tmp_path)]) == 1
    assert "nothing was measured yet" in capsys.readouterr().out
    assert not [*tmp_path.iterdir()]


def test_what_did_not_pass_or_is_older_is_neither_drawn_nor_summed_up(folder: Path) -> None:
    results = Results(folder)
    for row in results.rows:
        if row["provider"] == OURS:
            row["status"] = "failed the gate"
        elif row["provider"] == "torch.compile":
            row |= {"fingerprint": "older", "time": "2000-01-01T00:00:00Z"}
    results.search = []
    results.save()
    data = plots.load(folder)
    assert not {OURS, "torch.compile"} & set(data.rows["provider"])
    assert all(target.measured is None for target in summary.targets(data.rows))
    for plot in (plots.speedup, plots.landscape, plots.tuned):
        with pytest.raises(plots.NoData):
            plot(data)


def test_every_picture_may_have_no_data(tmp_path: Path) -> None:
    data = plots.load(tmp_path)
    for plot in plots.PLOTS.values():
        with pytest.raises(plots.NoData):
            plot(data)
    assert summary.tables(data) == ""


def test_the_summary_holds_targets_against_what_was_measured(folder: Path) -> None:
    data = plots.load(folder)
    rows = data.rows
    found = {target.what: target for target in summary.targets(rows)}
    copy = found["forward / copy, resident, worst shape"]
    assert copy.measured == pytest.approx(1.1)
    assert copy.met
    assert copy.cases > 20
    assert found["backward / copy, resident, worst shape"].measured is None  # its plan is split
    assert found["backward / copy, ResNet-50, geometric mean"].measured == pytest.approx(1.1)
    faster = found["torch (eager or compiled, the faster) / ours, geometric mean"]
    assert faster.measured == pytest.approx(1.6 / 1.1)
    eager = found["BN+add+ReLU, eager / ours, geometric mean"]
    assert eager.measured == pytest.approx(2.2 / 1.1)
    assert eager.met is False
    assert found["ResNet-50 step, torch / triton_bn"].measured == pytest.approx(60 / 45)
    assert found["ResNet-50 step, torch.compile / triton_bn + compile"].measured is None
    host = found["host time / torch eager's, small tensor"]
    assert host.measured == pytest.approx(1.1 / 1.8)
    assert found["kept for backward in tensors, bn+relu"].measured == 1.0
    assert found["kept for backward in tensors, bn+add+relu"].met
    text = summary.tables(data)
    assert "| 256 | 4 | 3.96 | 1.00 | 4.00 |" in text
    assert "| 256x256x56x56 contiguous bn forward | streamed | " in text
    assert "| ResNet-50 step, torch.compile / triton_bn + compile | ≥ 1.00 |  |  |  |" in text
    assert "| forward / copy, resident, worst shape | ≤ 1.15 | 1.10 | yes |" in text


# ---- The command line and the visit --------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [[], ["search"], ["visit"]])
def test_without_a_gpu_it_says_what_it_needs_and_what_can_be_seen(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command) == 2
    text = capsys.readouterr().err
    assert "needs a GPU" in text
    assert "python -m triton_bn inspect" in text


def stage(name: str, code: str, share: float = 0.5) -> visit.Stage:
    return visit.Stage(name, lambda limit: [sys.executable, "-c", code.format(limit)], share)


#: Goes on in a child that does not listen.
STUBBORN = """
import subprocess, sys
print("so far", flush=True)
child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
subprocess.Popen([sys.executable, "-c", child]).wait()
"""


def test_a_stage_that_fails_or_hangs_costs_no_other_its_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(visit, "PATIENCE", 1.0)
    plan = (
        stage("fails", "import sys; print('the reason'); sys.exit(1)"),
        stage("hangs", STUBBORN, share=0.2),
        stage("works", "print('limit {}')"),
    )
    said: list[str] = []
    looked: list[int] = []
    failed, hung, worked = visit.perform(
        plan, seconds=20, said=said.append, meanwhile=lambda: looked.append(len(said))
    )
    assert (failed.result, failed.tail) == ("exit code 1", "the reason")
    assert hung.result == "stopped at its limit"
    assert hung.tail.startswith("so far")
    assert hung.seconds < 10
    assert looked.count(said.index("so far") + 1) >= 1, "what was said must be seen while it runs"
    assert worked.result == "done"
    assert 2 <= int(worked.tail.split()[1]) <= 8
    page = visit.report("A GPU", [failed, hung, worked], ["| what | target |"])
    assert "| hangs | stopped at its limit |" in page
    assert "the reason" in page
    assert "| what | target |" in page


def test_a_stage_whose_gpu_context_broke_goes_on_in_a_new_process(tmp_path: Path) -> None:
    code = """
import pathlib, sys
path = pathlib.Path(r"PATH")
path.write_text((path.read_text() if path.exists() else "") + "x")
print("run", len(path.read_text()))
sys.exit(3 if len(path.read_text()) < 3 else 0)
"""
    plan = [stage("breaks", code.replace("PATH", str(tmp_path / "runs")))]
    (outcome,) = visit.perform(plan, seconds=60, said=lambda line: None)
    assert outcome.result == "done"
    assert outcome.tail.split("\n") == ["run 1", "run 2", "run 3"]


def test_a_visit_ends_in_its_time_whichever_part_it_is_for() -> None:
    for chosen in (visit.stages(Path("results/gpu")), *zip(visit.stages(Path("results/gpu")))):
        left = 540.0
        for each in chosen:
            limit = int(min(each.share * left, left - visit.PATIENCE))
            command = each.command(limit)
            if "--budget" in command:  # ends by itself before it would be ended
                assert 0 < int(command[command.index("--budget") + 1]) < limit
            left -= limit + visit.PATIENCE
        assert left >= 0
    assert len(visit.FILES) <= 7


def visited(folder: Path, *argv: str) -> int:
    parser = argparse.ArgumentParser()
    visit.add_arguments(parser)
    return visit.visit(
        parser.parse_args([*argv, "--results", str(folder)]), "A GPU", folder / "a-gpu"
    )


def test_a_visit_hands_over_what_each_part_found_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUT", str(tmp_path / "out"))
    results, out = tmp_path / "results", tmp_path / "out"

    def stages(folder: Path) -> tuple[visit.Stage, ...]:
        write = "import pathlib; pathlib.Path(r'{}').write_text('found'); print('said')"
        return (
            stage("bench", write.replace("{}", str(folder / "bench.csv"))),
            stage("search", write.replace("{}", str(folder / "plans.json")) + "; 1/0"),
        )

    monkeypatch.setattr(visit, "stages", stages)
    assert visited(results, "--part", "bench") == 0
    assert {path.name for path in out.iterdir()} == {"visit.md", "visit.log", "bench.csv"}
    assert visited(results, "--part", "bench", "search") == 1
    assert {path.name for path in out.iterdir()} <= {*visit.FILES}
    assert (out / "plans.json").read_text() == "found"
    assert "| search | exit code 1 |" in (out / "visit.md").read_text()
    log = (out / "visit.log").read_text()
    assert log.count("====") == 2, "a second visit goes on in the first one's log"
    assert "ZeroDivisionError" in log
    assert "ZeroDivisionError" in capsys.readouterr().out


#: Tests as they are on a GPU: one that needs none, some that do, a file that cannot be collected.
SUITE = {
    "test_a.py": """
import pytest
@pytest.fixture(params=["reference", "kernels"])
def path(request): return request.param
@pytest.fixture
def device(): return "cpu"
def test_needs_no_gpu(): assert False
@pytest.mark.parametrize("path", ["a file"])
def test_of_files(path): assert False
def test_of_both(path): assert path == "kernels"
@pytest.mark.parametrize("i", range(4))
def test_right(device, i): pass
def test_wrong(device): assert 1 == 2, "the reason"
def test_breaks(device): raise RuntimeError("CUDA error: an illegal memory access")
def test_streamed(device): pass
""",
    "test_b.py": "import no_such_module_anywhere",
}


def test_the_tests_of_a_visit_leave_their_results_and_the_next_one_goes_on(tmp_path: Path) -> None:
    pytest.importorskip("xdist")
    for name, text in SUITE.items():
        (tmp_path / name).write_text(text)
    path = tmp_path / "tests.json"
    (options,) = [stage for stage in visit.stages(tmp_path / "gpu") if stage.name == "tests"]
    command = [*options.command(600)[:-1], "-o", "addopts=", str(tmp_path)]
    command[command.index("--visit") + 1] = str(path)
    command[command.index("-n") + 1] = "1"

    def pytest_run(command: list[str]) -> list[str]:
        done = subprocess.run(command, capture_output=True, text=True, cwd=visit.ROOT, timeout=120)
        return done.stdout.splitlines()

    lines = pytest_run(command)
    assert "FAILED" in "".join(lines)
    assert any("test_wrong: AssertionError: the reason" in line for line in lines)
    rows = pytest_visit.read(path)
    outcomes = {row["test"].rpartition("::")[2]: row["outcome"] for row in rows}
    right = {"test_of_both[kernels]", "test_streamed", *(f"test_right[{n}]" for n in range(4))}
    assert {name for name, outcome in outcomes.items() if outcome == "passed"} == right
    failed = {name for name, outcome in outcomes.items() if outcome == "failed"}
    assert {"test_wrong", "test_breaks"} <= failed
    assert any(name.endswith("test_b.py") for name in failed)
    assert next(name for name in outcomes if ".py" not in name) == "test_streamed", "telling first"
    path.write_text(path.read_text() + '{"test": "cut o')
    at = command.index("-n")
    pytest_run([*command[:at], *command[at + 6 :]])  # without xdist
    again = {row["test"].rpartition("::")[2] for row in pytest_visit.read(path)[len(rows) :]}
    assert not again & right
    assert {"test_wrong", "test_breaks"} <= again


# ---- A/B comparisons and waits -------------------------------------------------------------------


def test_every_question_asks_for_plans_that_there_are() -> None:
    """Under each choice, forward and backward; stages are set on the usual plan, whatever its are."""
    device, asked = DEVICES["H100"], 0
    for question in ab.QUESTIONS:
        assert len(question.providers) > 1
        assert all(case.question == question.name for case in question.cases)
        for case in question.cases:
            for problem in search.problems_of(case):
                for provider in question.providers:
                    choice = provider.inside.args[0] if provider.build is providers.ours else None
                    if problem.direction in case.measures and choice is not None:
                        usual = heuristic(problem, device)
                        plan = choice(problem, device, usual)
                        if question.name == "stages":
                            assert plan.transform.stages == int(provider.name[0])
                        else:
                            assert plan == usual or plan in candidates(problem, device)
                        asked += 1
    assert asked >= 40


@pytest.mark.skipif(not launch.interpreting(), reason="CPU tensors meet no plan otherwise")
def test_a_question_leaves_rows_beside_the_benchmarks(tmp_path: Path) -> None:
    case = replace(CASE, measures=("forward",))
    chosen = [ab.under(name, partial(providers.of_driver, name)) for name in ("split", "resident")]
    lab = replace(lab_of(FakeClock({})), providers=chosen)
    run([case], Results(tmp_path), lab_of(FakeClock({})))
    run([replace(case, question="drivers")], Results(tmp_path), lab)
    data = plots.load(tmp_path)
    assert set(data.rows["provider"]) == {COPY, OURS, TORCH}
    assert {provider: plan.split(":")[0] for provider, plan in zip(
        data.ab["provider"], data.ab["plan"], strict=True
    )} == {COPY: "", "split": "forward split", "resident": "forward resident"}  # fmt: skip


@pytest.mark.skipif(not launch.interpreting(), reason="interleaved in the interpreter alone")
@pytest.mark.parametrize("gang", [2, 8])
def test_programs_that_wait_for_one_another_read_what_all_have_published(gang: int) -> None:
    with interleaved(seed=gang, resident=3 * gang) as log:
        assert wait.rounds(gang, 3, 5, torch.device("cpu")).tolist() == [0] * 3 * gang
    assert not log.races


@pytest.mark.skipif(not launch.interpreting(), reason="interleaved in the interpreter alone")
def test_a_gang_of_which_not_all_run_waits_for_ever() -> None:
    with pytest.raises(Exception, match="wait") as error, interleaved(resident=3):
        wait.rounds(4, 1, 5, torch.device("cpu"))
    causes = [error.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    assert any(isinstance(each, Deadlock) for each in causes)


def test_a_wait_is_the_difference_of_many_rounds_and_few() -> None:
    clock = iter([9.0, 9.0, *([0.5, 2.5] * 3)])
    found = wait.measure_one(1, 1, torch.device("cpu"), lambda run: next(clock), repeats=3)
    assert found == pytest.approx((2.0, 2.0, 2.0))


def test_waits_are_measured_for_all_gangs_that_fit_and_once(tmp_path: Path) -> None:
    asked: list[tuple[int, int]] = []

    def one(gang: int, gangs: int, device: torch.device) -> tuple[float, float, float]:
        asked.append((gang, gangs))
        if gang == 8:
            raise RuntimeError("too many programs")
        return 1.0, 0.5, 2.0

    wait.measure_all(Results(tmp_path), DEVICES["H100"], one=one, say=lambda line: None)
    assert asked[:7] == [(gang, 132 // gang) for gang in (2, 4, 8, 16, 32, 64, 128)]
    assert asked[7:] == [(gang, 528 // gang) for gang in wait.GANGS]
    rows = Results(tmp_path).waits
    assert {row["status"] for row in rows if row["gang"] == 8} == {
        "RuntimeError: too many programs"
    }
    assert {row["us"] for row in rows if row["gang"] != 8} == {1.0}
    asked.clear()
    wait.measure_all(Results(tmp_path), DEVICES["H100"], one=one, say=lambda line: None)
    assert asked == []


@pytest.mark.gpu
def test_the_clock_times_the_call_and_not_what_prepares_it() -> None:
    def sleep(_: Any = None) -> None:
        torch.cuda._sleep(20_000_000)  # some 10 ms

    clock = DeviceClock(torch.device("cuda"))
    calls = [Call("long", sleep), Call("prepared", lambda _: None, sleep)]
    for _ in range(3):
        long, prepared = clock.round(calls)
    assert long > 5
    assert prepared < 1


@pytest.mark.gpu
def test_a_case_is_measured_on_the_gpu(tmp_path: Path) -> None:
    case = Case("test", (8, 64, 28, 28), "channels_last", "bfloat16", "bn+relu", TRAIN)
    chosen = of_name(OURS, "triton_bn split", TORCH, "torch cuDNN")
    lab = Lab(torch.device("cuda"), chosen, seconds=0.05)
    rows = measure(case, lab)
    assert {row["status"] for row in rows} == {"measured"}
    assert all(0 < row["p20_ms"] <= row["ms"] <= row["p80_ms"] < 100 for row in rows)
    assert by_provider(rows)[OURS]["plan"]


@pytest.mark.gpu
@pytest.mark.parametrize("a_processor", wait.A_PROCESSOR)
def test_programs_wait_for_one_another_on_the_gpu(a_processor: int) -> None:
    gpu = torch.device("cuda")
    for gang in wait.GANGS:
        gangs = Device.current(gpu).processors * a_processor // gang
        if gangs:
            assert not wait.rounds(gang, gangs, 200, gpu).any()
