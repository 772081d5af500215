"""The benchmark suite without a GPU: fake clocks and time, real providers on small CPU tensors."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("pandas", reason="needs the perf extra")
pytest.importorskip("matplotlib", reason="needs the perf extra")

from perf import gate, plots, providers, runner, search, subjects, summary, visit
from perf.__main__ import main
from perf.cases import OPS, TRAIN, Case, select
from perf.clocks import Call, DeviceClock
from perf.providers import COPY, Provider, Unsupported
from perf.runner import COLUMNS, Lab, Results, Row, measure
from perf.runner import run_cases as run
from triton_bn import launch
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
    first = cases[:16]
    assert {(case.network, case.dtype, case.op) for case in first} == {
        ("ResNet-50", "bfloat16", "bn")
    }
    assert {case.shape[0] for case in first} == {256, 32}
    assert {case.layout for case in first} == {"contiguous", "channels_last"}
    early = {measure for case in cases[:40] for measure in case.measures}
    assert early >= {*TRAIN, "step", "host", "memory"}
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
        bits = tensor / 32 if op == "bn+add+relu" else 0
        vectors = 10 * 8 * 4
        assert tensor + bits <= rows[OURS]["kept_bytes"] <= tensor + bits + vectors
        assert theirs * tensor <= rows[TORCH]["kept_bytes"] <= theirs * tensor + vectors


def squares(layer: Any, case: Case, x: Tensor) -> providers.Norm:
    return providers.followed(lambda x: layer(x) + 0 * (x * x), case)


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
    """A table as a search would make it, one candidate failed and one stopped early."""
    rows = []
    for index, plan in enumerate(candidates(problem, device)):
        ms = 0.02 + 0.001 * (index * 7 % 13)
        status = {1: "failed: no kernel", 2: "stopped early"}.get(index, "timed")
        timing = None if index == 1 else Timing(ms, 0.99 * ms, 1.02 * ms, 20)
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
    for case in select(["ResNet-50", "bfloat16"]):
        for name in case.measures:
            for provider, factor in FACTORS.items():
                if case.op == "model" or (provider == "torch cuDNN" and case.residual):
                    continue
                kept = {OURS: 1.07 if case.residual else 1.0, TORCH: 2.0}.get(provider)
                tensor = case.bytes("forward") // (3 if case.residual else 2)
                subject = subjects.Subject(provider, plan="forward resident: a; backward split: b")
                if name == "memory":
                    subject.facts = {"kept_bytes": kept and kept * tensor}
                    rows.append(runner._row(case, name, subject, lab))
                    continue
                copy = 0.004 + case.bytes(name) / 3e9
                times = [copy * factor * jitter for jitter in (0.98, 1.0, 1.0, 1.0, 1.05)]
                rows.append(runner._row(case, name, subject, lab, times, copy))
    step = select(["step"])[0]
    for provider, ms in {"torch": 60.0, OURS: 45.0, "torch.compile": 50.0}.items():
        rows.append(runner._row(step, "step", subjects.Subject(provider), lab, [ms] * 5))
    return rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of results of a GPU that does not exist."""
    lab = lab_of(FakeClock({}))
    lab.about["gpu"] = "No GPU (made for a test)"
    results = Results(tmp_path / "no_gpu")
    results.rows = fake_rows(lab)
    first, backward, *_ = search.problems(select(["ResNet-50", "32x512x28x28"]))
    for problem in (first, backward):
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
    assert set(pictures) == {"bandwidth", "speedup", "scaling", "landscape", "compile"}
    assert set(capsys.readouterr().out.split()) == {str(path) for path in pictures.values()}
    for path in pictures.values():
        data = path.read_bytes()
        assert data.startswith(b"\x89PNG")
        assert 10_000 < len(data) < 1 << 20


def test_pictures_show_what_they_are_about(folder: Path) -> None:
    rows, searched = plots.load(folder)

    def texts(figure: Any) -> str:
        found = figure.findobj(lambda artist: hasattr(artist, "get_text"))
        return "\n".join(artist.get_text() for artist in found)

    shown = {name: texts(plot(rows, searched)) for name, plot in plots.PLOTS.items()}
    for text in shown.values():
        assert "No GPU (made for a test)" in text or "H200" in text
    assert {"triton_bn", "torch.compile", "unheard of"} <= set(shown["bandwidth"].split("\n"))
    assert "a copy of the\nsame bytes" in shown["bandwidth"]
    assert f"{1.8 / 1.1:.2f}" in shown["speedup"]  # eager is the faster of native and cuDNN
    assert "1024×14×14" in shown["scaling"]
    assert "failed" in shown["landscape"]
    assert "not timings" in texts(plots.compile_facts(plots.pd.DataFrame(compiled_facts())))
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
    rows, searched = plots.load(folder)
    assert not {OURS, "torch.compile"} & set(rows["provider"])
    assert all(target.measured is None for target in summary.targets(rows))
    for plot in (plots.speedup, plots.landscape):
        with pytest.raises(plots.NoData):
            plot(rows, searched)


def test_the_summary_holds_targets_against_what_was_measured(folder: Path) -> None:
    rows, _ = plots.load(folder)
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
    assert found["host time / torch eager's, small tensor"].measured is None
    assert found["kept for backward in tensors, bn+relu"].measured == 1.0
    assert found["kept for backward in tensors, bn+add+relu"].met
    text = summary.table(rows)
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
        stage("fails", "import sys; print('the reason'); sys.exit(3)"),
        stage("hangs", STUBBORN, share=0.2),
        stage("works", "print('limit {}')"),
    )
    failed, hung, worked = visit.perform(plan, seconds=20)
    assert (failed.result, failed.tail) == ("exit code 3", "the reason")
    assert hung.result == "stopped at its limit"
    assert hung.tail.startswith("so far")
    assert hung.seconds < 10
    assert worked.result == "done"
    assert 2 <= int(worked.tail.split()[1]) <= 8
    page = visit.report("A GPU", [failed, hung, worked], "| what | target |")
    assert "| hangs | stopped at its limit |" in page
    assert "the reason" in page
    assert "| what | target |" in page


def test_a_visit_fits_in_ten_minutes_and_eight_files() -> None:
    left = 570.0
    for each in visit.stages(Path("results")):
        limit = int(each.share * left)
        command = each.command(limit)
        if "--budget" in command:  # ends by itself before it would be ended
            assert int(command[command.index("--budget") + 1]) < limit
        left -= limit
    assert left > 0
    assert len(visit.FILES) <= 8


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
