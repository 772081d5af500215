"""Search and resolve, with a clock, a GPU and kernels that are made up."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from triton_bn import launch
from triton_bn.inspection.report import KernelFacts
from triton_bn.plan import DEVICES, Device, Plan, candidates, heuristic
from triton_bn.problem import Problem
from triton_bn.tuning import ahead, cache, memory, resolve, search
from triton_bn.tuning.tune import compile_ahead, tune

GPU = DEVICES["H200"]


def problem(inner: int = 3136, **changes: object) -> Problem:
    return Problem("forward", 32, 64, inner, (64 * inner, inner, 1), torch.bfloat16, 8, **changes)


FORWARD = problem()
PLANS = candidates(FORWARD, GPU)


class Run:
    """A plan on a :class:`Bench`."""

    def __init__(self, bench: Bench, plan: Plan) -> None:
        self.bench, self.plan = bench, plan

    def __call__(self) -> None:
        cost = self.bench.cost(self.plan)
        if isinstance(cost, BaseException):
            raise cost
        self.bench.runs.append(self.plan)
        self.bench.now += cost / 1e3

    def observe(self) -> None:
        self()

    def wrong(self) -> str:
        found = self.bench.verdict(self.plan)
        if isinstance(found, BaseException):
            raise found
        return found


class Bench:
    """A made-up GPU: each plan takes the milliseconds, or raises the error, that ``cost`` says."""

    def __init__(self, cost: Callable[[Plan], float | BaseException]) -> None:
        self.cost = cost
        self.now = 0.0
        self.runs: list[Plan] = []
        #: What the compiler says, and what it was asked.
        self.facts: dict[tuple[Problem, Device], dict[Plan, object]] = {}
        self.compilations: list[tuple[list[tuple[Problem, Device, object]], dict[str, object]]] = []
        #: What is wrong with a plan's results.
        self.verdict: Callable[[Plan], str | BaseException] = lambda plan: ""
        self.trials: list[tuple[Problem, Plan, Device]] = []

    def trial(self, problem: Problem, plan: Plan, device: Device) -> Run:
        self.trials.append((problem, plan, device))
        return Run(self, plan)

    def compiled(self, wanted: list[tuple[Problem, Device, object]], **options: object) -> object:
        self.compilations.append((wanted, options))
        return self.facts

    def timer(self, run: Callable[[], None], runs: int) -> list[float]:
        times = []
        for _ in range(runs):
            start = self.now
            run()
            times.append((self.now - start) * 1e3)
        return times


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty memory and cache folder, as in a new process of a new user."""
    monkeypatch.setenv("TRITON_BN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("TRITON_BN_TUNE", raising=False)
    monkeypatch.setattr(cache, "_warned", set())
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process."""
    monkeypatch.setattr(memory, "memo", {})


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bench]:
    """Costs by order of the candidates: the heuristic takes 2 ms, the last candidate 1 ms."""
    bench = Bench(lambda plan: 1.0 if plan == PLANS[-1] else 2.0 + PLANS.index(plan) * 1e-3)
    monkeypatch.setattr(search, "_launch_trial", bench.trial)
    monkeypatch.setattr(search, "time_cold", bench.timer)
    monkeypatch.setattr(search, "_compiled", bench.compiled)
    monkeypatch.setattr(search, "require_gpu", lambda verb: None)
    monkeypatch.setattr(search, "monotonic", lambda: bench.now)
    return bench


def stored() -> dict[str, dict[str, object]]:
    return json.loads(memory.table_path(GPU).read_text())["entries"]


def edit(change: Callable[[dict[str, object]], object]) -> None:
    """Edits the file by hand."""
    path = memory.table_path(GPU)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


class Idle:
    """A run of nothing: what is called, in order."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def __call__(self) -> None:
        self.calls.append("run")

    def observe(self) -> None:
        self.calls.append("observe")

    def wrong(self) -> str:
        return ""


# ---- measure -------------------------------------------------------------------------------------


def test_median_and_spread_are_of_the_timed_runs_alone() -> None:
    times = iter([100.0] * search.PROBE + [float(n % 10) for n in range(1000)])
    timing = search.measure(Idle(), timer=lambda run, n: [next(times) for _ in range(n)], spend=1e6)
    assert timing.runs == 200
    assert (timing.p20, timing.median, timing.p80) == (pytest.approx(1.8), 4.5, pytest.approx(7.2))


@pytest.mark.parametrize(("cost", "runs"), [(100.0, 20), (1.0, 40), (0.0, 200)])
def test_the_number_of_runs_follows_their_length(cost: float, runs: int) -> None:
    timing = search.measure(Idle(), timer=lambda run, n: [cost] * n, spend=40.0)
    assert (timing.median, timing.runs, timing.stopped) == (cost, runs, False)


def test_results_are_kept_before_the_first_and_after_the_last_run_that_counts() -> None:
    run, times = Idle(), iter([1.0] * search.PROBE + [9.0] + [1.0] * 40 + [9.0])

    def timer(step: Callable[[], None], runs: int) -> list[float]:
        for _ in range(runs):
            step()
        return [next(times) for _ in range(runs)]

    timing = search.measure(run, timer=timer, spend=40.0)
    assert (timing.runs, timing.p80) == (40, 1.0)
    assert run.calls == [*["run"] * (1 + search.PROBE), "observe", *["run"] * 40, "observe"]


def test_a_run_beyond_the_limit_is_stopped_after_a_few() -> None:
    run = Idle()
    timing = search.measure(run, timer=lambda run, n: [2.0] * n, limit=1.5)
    assert (timing.runs, timing.stopped, run.calls) == (search.PROBE, True, ["run"])


def test_every_timed_run_finds_the_caches_cold(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")
            self.at = len(log)

        def elapsed_time(self, end: Event) -> float:
            assert log[-1] == "synchronize"
            return float(end.at - self.at)

    interface = SimpleNamespace(Event=Event, synchronize=lambda: log.append("synchronize"))
    active = SimpleNamespace(
        get_device_interface=lambda: interface,
        get_empty_cache_for_benchmark=lambda: "buffer",
        clear_cache=lambda buffer: log.append(f"clear {buffer}"),
    )
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
    assert search.time_cold(lambda: log.append("run"), 3) == [2.0] * 3
    once = ["clear buffer", "event", "run", "event"]
    assert log[-13:] == [*once * 3, "synchronize"]


# ---- search --------------------------------------------------------------------------------------


def test_a_search_finds_the_fastest_of_all_candidates(bench: Bench) -> None:
    result = search.search(FORWARD, GPU, progress=False)
    assert result.best is not None
    assert result.best.plan == PLANS[-1]
    assert {row.plan for row in result.rows} == set(PLANS)
    assert result.complete
    assert {(p, d) for p, _, d in bench.trials} == {(FORWARD, GPU)}
    assert result.gain == pytest.approx(2.0)
    medians = [row.timing.median for row in result.rows if row.status == "timed"]
    assert medians == sorted(medians)


def test_hopeless_candidates_are_stopped_early(bench: Bench) -> None:
    bench.cost = lambda plan: {0: 1.0, 1: 1.4, 2: 1.6}.get(PLANS.index(plan), 9.0)
    result = search.search(FORWARD, GPU, progress=False)
    status = {PLANS.index(row.plan): row.status for row in result.rows}
    assert (status[0], status[1], status[2]) == ("timed", "timed", "stopped early")
    # One run to compile, and the few that decide.
    assert bench.runs.count(PLANS[2]) == 1 + search.PROBE


def test_candidates_that_fail_are_rows_with_their_error(bench: Bench) -> None:
    class OutOfResources(Exception):
        pass

    bench.cost = lambda plan: (
        OutOfResources("out of resource: shared memory\nRequired: 1")
        if plan == PLANS[0]
        else 1.0 + PLANS.index(plan) * 1e-2
    )
    result = search.search(FORWARD, GPU, progress=False)
    failed = [row for row in result.rows if row.plan == PLANS[0]]
    assert failed[0].status == "failed: OutOfResources: out of resource: shared memory"
    assert result.best is not None
    assert result.best.plan == PLANS[1]
    assert (result.complete, result.gain) == (True, None)


def test_where_everything_fails_nothing_is_remembered(bench: Bench) -> None:
    bench.cost = lambda plan: torch.OutOfMemoryError("out of memory")
    result = search.search(FORWARD, GPU, progress=False)
    assert result.best is None
    assert not memory.table_path(GPU).exists()
    assert resolve.resolve(FORWARD, GPU) == heuristic(FORWARD, GPU)
    assert "nothing timed" in result.summary()


def test_the_fastest_are_timed_again_and_the_faster_time_counts(bench: Bench) -> None:
    """The GPU is slow at first, so that the true winner, timed first, seems to lose."""
    seen: list[Plan] = []

    def cost(plan: Plan) -> float:
        seen.append(plan)
        cold = len(set(seen)) == 1
        return 1.05 if cold else 1.0 if plan == PLANS[0] else 1.02 + PLANS.index(plan) * 2e-2

    bench.cost = cost
    best = search.search(FORWARD, GPU, progress=False).best
    assert best is not None
    assert (best.plan, best.timing.median) == (PLANS[0], pytest.approx(1.0))


def test_a_wrong_result_never_wins_and_is_told_of(bench: Bench) -> None:
    bench.verdict = lambda plan: "y is off" if plan in (PLANS[-1], PLANS[2]) else ""
    with pytest.warns(RuntimeWarning, match="2 plans for .* give wrong results") as caught:
        result = search.search(FORWARD, GPU, progress=False)
    assert len(caught) == 1
    status = {row.plan: row.status for row in result.rows}
    assert status[PLANS[-1]] == status[PLANS[2]] == "wrong result: y is off"
    assert result.best.plan == PLANS[0]
    assert resolve.resolve(FORWARD, GPU) == PLANS[0]


def test_the_heuristics_own_wrong_result_is_what_is_reported(bench: Bench) -> None:
    bench.verdict = lambda plan: "" if plan == PLANS[-1] else "y is off"
    with pytest.warns(RuntimeWarning) as caught:
        assert search.search(FORWARD, GPU, progress=False).best.plan == PLANS[-1]
    first, second = (str(warning.message) for warning in caught)
    assert "runs by untuned gives a wrong result" in first
    assert f"{len(PLANS) - 1} plans" in second


def test_a_result_that_is_wrong_the_second_time_is_wrong(bench: Bench) -> None:
    """The finalists are timed, and looked at, again."""
    bench.verdict = lambda plan: (
        "other bits" if plan == PLANS[-1] and bench.trials[-1] in bench.trials[:-1] else ""
    )
    with pytest.warns(RuntimeWarning, match="wrong result"):
        result = search.search(FORWARD, GPU, progress=False)
    assert result.best.plan == PLANS[0]


def test_what_was_not_checked_cannot_win(bench: Bench) -> None:
    bench.verdict = lambda plan: torch.OutOfMemoryError() if plan == PLANS[-1] else ""
    result = search.search(FORWARD, GPU, progress=False)
    assert {row.status for row in result.rows if row.plan == PLANS[-1]} == {
        "not checked: out of memory"
    }
    assert result.best.plan == PLANS[0]


def test_a_budget_ends_the_search_but_keeps_what_was_found(bench: Bench) -> None:
    result = search.search(FORWARD, GPU, budget=0.1, progress=False)
    timed = [row for row in result.rows if row.status == "timed"]
    assert [row.plan for row in timed] == list(PLANS[:2])  # of 26 runs, 2 ms each
    assert {row.status for row in result.rows if row.plan in PLANS[2:]} == {"not reached"}
    assert not result.complete
    assert stored()[str(FORWARD)]["complete"] is False
    assert search.search(FORWARD, GPU, budget=0.0, progress=False).best is None


def test_a_shorter_search_does_not_forget_a_better_plan(bench: Bench) -> None:
    search.search(FORWARD, GPU, progress=False)
    again = search.search(FORWARD, GPU, budget=0.1, progress=False)
    assert again.best is not None
    assert again.best.plan == PLANS[-1]
    assert resolve.resolve(FORWARD, GPU) == PLANS[-1]


def test_ctrl_c_keeps_what_was_found(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.cost = lambda plan: {0: 3.0, 1: 2.0}.get(PLANS.index(plan), KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt) as caught:
        search.search(FORWARD, GPU, progress=False)
    (result,) = caught.value.report
    assert [row.status for row in result.rows[:3]] == ["timed", "timed", "not reached"]
    assert result.best.plan == PLANS[1]
    assert resolve.resolve(FORWARD, GPU).source == "tuned now"
    forget(monkeypatch)
    plan = resolve.resolve(FORWARD, GPU)
    assert (plan, plan.source) == (PLANS[1], "disk")


def test_the_table_can_be_read_and_computed_with(bench: Bench) -> None:
    result = search.search(FORWARD, GPU, progress=False)
    text = str(result)
    assert str(FORWARD) in text
    assert GPU.name in text
    assert len(text.splitlines()) == 2 + len(PLANS)
    assert (text.count("(heuristic)"), text.count("(candidate)")) == (1, 0)
    rows = json.loads(json.dumps(result.as_rows()))
    assert rows[0]["best"]
    assert rows[0]["median_ms"] == pytest.approx(1.0)
    assert rows[0]["transform_warps"] == PLANS[-1].transform.warps
    assert (rows[0]["channels"], rows[0]["program_channels"]) == (64, PLANS[-1].channels)
    assert [row["heuristic"] for row in rows].count(True) == 1
    assert len({tuple(row) for row in rows}) == 1
    assert "2.00x" in result.summary()


def test_progress_goes_to_stderr(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    search.search(FORWARD, GPU, title="1/1 layer")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1/1 layer" in captured.err
    assert "best 1.0000 ms" in captured.err


def test_progress_without_rich_is_one_line(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    search.search(FORWARD, GPU)
    assert capsys.readouterr().err == f"tuned {FORWARD}: best 1.0000 ms\n"


def test_progress_beside_a_bar_of_the_callers(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    progress, errors = pytest.importorskip("rich.progress"), pytest.importorskip("rich.errors")

    def start(self: object) -> None:  # as older releases of rich do
        raise errors.LiveError("Only one live display may be active at once")

    monkeypatch.setattr(progress.Progress, "start", start)
    assert search.search(FORWARD, GPU).complete
    assert "best 1.0000 ms" in capsys.readouterr().err


# ---- resolve -------------------------------------------------------------------------------------


def test_nothing_is_timed_unasked(bench: Bench) -> None:
    plan = resolve.resolve(FORWARD, GPU)
    assert (plan, plan.source) == (heuristic(FORWARD, GPU), "heuristic")
    assert bench.trials == []
    assert not memory.table_path(GPU).parent.exists()


def test_the_order_is_memory_disk_shipped_heuristic(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shipped = tmp_path / "shipped.json"
    entry = {"plan": PLANS[1].as_dict()}
    # Shipped tables may stem from an older release.
    cache.write(shipped, cache.Document("older", {str(FORWARD): entry}))
    monkeypatch.setattr(memory, "_shipped_table", lambda name: cache.Store(shipped, None))

    def resolved() -> tuple[Plan, str]:
        plan = resolve.resolve(FORWARD, GPU)
        return plan, plan.source

    assert resolve.resolve(problem(49), GPU).source == "heuristic"
    assert resolved() == (PLANS[1], "shipped")
    search.search(FORWARD, GPU, progress=False)
    assert resolved() == (PLANS[-1], "tuned now")
    forget(monkeypatch)
    assert resolved() == (PLANS[-1], "disk")
    memory.table_path(GPU).unlink()
    assert resolved() == (PLANS[-1], "disk")
    forget(monkeypatch)
    assert resolved() == (PLANS[1], "shipped")


def test_the_hot_path_is_one_look_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counting(dict):  # type: ignore[type-arg]
        calls = 0

        def get(self, *arguments: object) -> object:
            self.calls += 1
            return super().get(*arguments)

        def __getitem__(self, key: object) -> object:
            self.calls += 1
            return super().__getitem__(key)

        def __contains__(self, key: object) -> bool:
            self.calls += 1
            return super().__contains__(key)

    plan = resolve.resolve(FORWARD, GPU)
    memo = Counting(memory.memo)
    monkeypatch.setattr(memory, "memo", memo)
    monkeypatch.setattr(resolve, "_first", None)
    assert resolve.resolve(problem(), replace(GPU)) is plan
    assert memo.calls == 1


@pytest.mark.parametrize(
    "plan",
    [
        None,
        "split",
        [],
        {},
        {"driver": "split"},
        {**PLANS[1].as_dict(), "channels": 7},
        {**PLANS[1].as_dict(), "unheard": 7},
        {**PLANS[1].as_dict(), "reduce": []},
        {**PLANS[1].as_dict(), "transform": {**PLANS[1].as_dict()["transform"], "warps": 64}},
    ],
)
def test_a_file_cannot_launch_what_is_no_candidate(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, plan: object
) -> None:
    search.search(FORWARD, GPU, progress=False)
    edit(lambda data: data["entries"][str(FORWARD)].update(plan=plan))
    forget(monkeypatch)
    with pytest.warns(RuntimeWarning, match="plan refused"):
        assert resolve.resolve(FORWARD, GPU).source == "heuristic"
    forget(monkeypatch)
    assert resolve.resolve(FORWARD, GPU).source == "heuristic"  # silent now


def test_a_plan_from_a_file_is_the_candidate_itself(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    search.search(FORWARD, GPU, progress=False)
    tile = PLANS[-1].as_dict()["transform"]
    edit(
        lambda data: data["entries"][str(FORWARD)]["plan"].update(
            transform={name: float(value) for name, value in tile.items()}
        )
    )
    forget(monkeypatch)
    assert isinstance(resolve.resolve(FORWARD, GPU).transform.rows, int)


def test_a_changed_kernel_never_meets_an_old_plan(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    search.search(FORWARD, GPU, progress=False)
    edit(lambda data: data.update(fingerprint="other"))
    forget(monkeypatch)
    with pytest.warns(RuntimeWarning, match="written under version other"):
        assert resolve.resolve(FORWARD, GPU).source == "heuristic"


def test_the_fingerprint_covers_the_sources_of_kernels_and_plans(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = memory.fingerprint()
    read = Path.read_bytes
    seen: dict[str, str] = {}
    for name in ("kernels/forward.py", "kernels/moments.py", "plan.py", "launch.py", "cache.py"):

        def changed(path: Path, name: str = name) -> bytes:
            return read(path) + (b"#" if path.as_posix().endswith("triton_bn/" + name) else b"")

        monkeypatch.setattr(Path, "read_bytes", changed)
        seen[name] = memory.fingerprint.__wrapped__()
    assert seen.pop("cache.py") == before
    assert len({before, *seen.values()}) == 5
    monkeypatch.setattr(Path, "read_bytes", read)
    monkeypatch.setattr(memory, "_triton_version", lambda: "0.0")
    assert memory.fingerprint.__wrapped__() != before


def test_files_are_kept_by_gpu_and_triton_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_triton_version", lambda: "3.9.0")
    assert memory.table_path(GPU).name == "nvidia-h200_triton-3.9.0.json"


# ---- TRITON_BN_TUNE=1 ----------------------------------------------------------------------------


def test_first_use_searches_when_asked_to(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BN_TUNE", "1")
    plan = resolve.resolve(FORWARD, GPU)
    assert (plan, plan.source) == (PLANS[-1], "tuned now")
    trials = len(bench.trials)
    assert resolve.resolve(FORWARD, GPU) == plan
    forget(monkeypatch)
    assert resolve.resolve(FORWARD, GPU).source == "disk"
    assert len(bench.trials) == trials


def test_a_graph_under_capture_is_left_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BN_TUNE", "1")
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert resolve.resolve(FORWARD, GPU).source == "heuristic"
    assert bench.trials == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert resolve.resolve(FORWARD, GPU).source == "tuned now"


def test_the_interpreter_is_never_timed(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BN_TUNE", "1")
    assert resolve.resolve(FORWARD, DEVICES["interpreter"]).source == "heuristic"
    assert bench.trials == []


def test_a_failed_search_at_first_use_warns_and_goes_on(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_BN_TUNE", "1")
    bench.cost = lambda plan: RuntimeError("no")
    with pytest.warns(RuntimeWarning, match="could be timed"):
        assert resolve.resolve(FORWARD, GPU).source == "heuristic"
    trials = len(bench.trials)
    assert resolve.resolve(FORWARD, GPU).source == "heuristic"
    assert len(bench.trials) == trials


def test_ranks_that_meet_a_problem_together_search_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock is the operating system's, between descriptors: threads stand for processes."""
    monkeypatch.setenv("TRITON_BN_TUNE", "1")
    memos = threading.local()
    started = threading.Barrier(4)

    class Separate(dict):  # type: ignore[type-arg]
        """Each thread sees its own memory, as processes do."""

        def get(self, key: object, default: object = None) -> object:
            return vars(memos).get("memo", {}).get(key, default)

        def __setitem__(self, key: object, value: object) -> None:
            vars(memos).setdefault("memo", {})[key] = value

    monkeypatch.setattr(memory, "memo", Separate())
    plans: list[Plan] = []

    def rank() -> None:
        started.wait()
        plans.append(resolve.resolve(FORWARD, GPU))

    threads = [threading.Thread(target=rank) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert plans == [PLANS[-1]] * 4
    assert sorted(plan.source for plan in plans) == ["disk"] * 3 + ["tuned now"]
    assert len(bench.trials) == len(PLANS) + search.FINALISTS


def test_who_waits_too_long_goes_on_without(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_BN_TUNE", "1")
    monkeypatch.setattr(search, "PATIENCE", 0.01)
    with cache.lock(memory.table_path(GPU).with_suffix(".search.lock"), 0.0) as held:
        assert held
        with pytest.warns(RuntimeWarning, match="another process"):
            assert resolve.resolve(FORWARD, GPU).source == "heuristic"
        with pytest.raises(TimeoutError, match="another process"):
            search.search_all([(FORWARD, GPU)], progress=False)
    assert bench.trials == []


def test_the_gpu_is_idle_before_the_lock_is_taken(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A holder that waits for a collective would wait for ranks that wait for the lock."""
    order: list[str] = []
    lock = cache.lock

    def watched(path: Path, *rest: object, **options: object) -> object:
        if path.name.endswith(".search.lock"):
            order.append("lock")
        return lock(path, *rest, **options)

    monkeypatch.setattr(cache, "lock", watched)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("synchronize"))
    search.search_all([(FORWARD, GPU)], progress=False)
    assert order == ["synchronize", "lock"]


def test_a_read_only_folder_costs_the_memory_on_disk_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file in its place")
    monkeypatch.setenv("TRITON_BN_TUNE", "1")
    with pytest.warns(RuntimeWarning, match="not written"):
        assert resolve.resolve(FORWARD, GPU).source == "tuned now"
    assert resolve.resolve(FORWARD, GPU) == PLANS[-1]


# ---- record and tune -----------------------------------------------------------------------------


class Scale(torch.autograd.Function):
    """Resolves a plan forward and another backward, as the operators do."""

    @staticmethod
    def forward(ctx: object, x: Tensor, weight: Tensor, device: Device) -> Tensor:
        ctx.device, ctx.inner = device, x.shape[-1]
        resolve.resolve(problem(ctx.inner), device)
        return x * 2

    @staticmethod
    def backward(ctx: object, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        resolve.resolve(problem(ctx.inner, training=False), ctx.device)
        return dy * 2, dy.sum(), None


class Layer(nn.Module):
    def __init__(self, device: Device = GPU) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer("calls", torch.zeros(()))
        self.device = device

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return {"y": Scale.apply(x + torch.rand(()), self.weight, self.device)}


def test_recording_sees_what_is_already_known_and_searches_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = resolve.resolve(FORWARD, GPU)
    monkeypatch.setenv("TRITON_BN_TUNE", "1")
    with memory.record() as seen:
        for inner in (3136, 49, 3136):
            resolve.resolve(problem(inner), GPU)
    assert list(seen) == [(FORWARD, GPU), (problem(49), GPU)]
    assert bench.trials == []
    assert resolve.resolve(FORWARD, GPU) is known
    # What was seen for the first time while recording may still be searched.
    bench.cost = lambda plan: 1.0
    assert resolve.resolve(problem(49), GPU).source == "tuned now"


def test_two_may_record_at_once_and_no_plan_is_lost(bench: Bench) -> None:
    """They end in the order in which they began; meanwhile somebody finds a plan."""
    known, other = resolve.resolve(FORWARD, GPU), problem(49)
    resolve.resolve(other, GPU)
    first, second = memory.record(), memory.record()
    seen_first = first.__enter__()
    resolve.resolve(FORWARD, GPU)
    seen_second = second.__enter__()
    resolve.resolve(FORWARD, GPU)
    bench.cost = lambda plan: 1.0
    search.search(problem(98), GPU, progress=False)
    first.__exit__(None, None, None)
    resolve.resolve(other, GPU)
    second.__exit__(None, None, None)
    assert list(seen_first) == [(FORWARD, GPU)]
    assert list(seen_second) == [(FORWARD, GPU), (other, GPU)]
    assert resolve.resolve(FORWARD, GPU) is known
    assert resolve.resolve(problem(98), GPU).source == "tuned now"


def test_nothing_is_searched_for_a_plan_that_is_given(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_BN_TUNE", "1")
    with resolve.use("split"), memory.record() as seen:
        assert resolve.resolve(FORWARD, GPU).driver == "split"
    assert list(seen) == [(FORWARD, GPU)]
    with resolve.use("split"):
        assert resolve.resolve(FORWARD, GPU).driver == "split"
    assert bench.trials == []
    assert resolve.resolve(FORWARD, GPU).source == "tuned now"


def test_recording_ends_with_an_error(bench: Bench) -> None:
    known = resolve.resolve(FORWARD, GPU)
    with pytest.raises(RuntimeError), memory.record():
        raise RuntimeError
    assert resolve.resolve(FORWARD, GPU) is known


def test_tune_searches_what_a_model_runs_and_leaves_it_as_it_was(bench: Bench) -> None:
    bench.cost = lambda plan: 1.0
    layer, x = Layer(), torch.ones(2, 3136)
    model = nn.Sequential(layer)
    state = torch.get_rng_state()
    report = tune(model, x, progress=False)
    assert [result.problem for result in report] == [FORWARD, problem(training=False)]
    assert all(result.complete for result in report)
    assert resolve.resolve(problem(training=False), GPU).source == "tuned now"
    assert layer.calls.item() == 0
    assert layer.weight.grad is None
    assert not x.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert str(FORWARD) in str(report)
    assert len(report.summary().splitlines()) == 3
    assert len(report.as_rows()) == sum(len(result.rows) for result in report)


def test_without_gradients_backward_is_not_tuned(bench: Bench) -> None:
    with torch.no_grad():
        report = tune(Layer(), torch.ones(2, 3136), progress=False)
    assert [result.problem for result in report] == [FORWARD]


def test_what_was_tuned_before_is_not_timed_again_unless_asked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    search.search_all([(FORWARD, GPU)], progress=False)
    trials = len(bench.trials)
    forget(monkeypatch)
    memory.memo[FORWARD, GPU] = heuristic(FORWARD, GPU)
    ((row,),) = (result.rows for result in search.search_all([(FORWARD, GPU)], progress=False))
    assert (row.plan, row.status, row.timing.median) == (PLANS[-1], "remembered", pytest.approx(1))
    assert resolve.resolve(FORWARD, GPU).source == "disk"
    assert len(bench.trials) == trials
    (result,) = search.search_all([(FORWARD, GPU)], again=True, progress=False)
    assert len(result.rows) == len(PLANS)


def test_an_incomplete_search_is_taken_up_again(bench: Bench) -> None:
    search.search_all([(FORWARD, GPU)], budget=0.1, progress=False)
    (result,) = search.search_all([(FORWARD, GPU)], progress=False)
    assert (result.complete, result.best.plan) == (True, PLANS[-1])


@pytest.mark.parametrize("value", ["fast", float("inf"), float("nan"), [[1]], None])
@pytest.mark.parametrize("field", ["median", "runs", "p80"])
def test_a_result_edited_by_hand_is_searched_again(bench: Bench, field: str, value: object) -> None:
    search.search_all([(FORWARD, GPU)], progress=False)
    edit(lambda data: data["entries"][str(FORWARD)].update({field: value}))
    (result,) = search.search_all([(FORWARD, GPU)], progress=False)
    assert len(result.rows) == len(PLANS)


def test_a_budget_is_for_all_searches_the_largest_first(bench: Bench) -> None:
    bench.cost = lambda plan: 2.0
    small, large = problem(1024), problem(4096)
    report = search.search_all([(small, GPU), (large, GPU)], budget=0.1, progress=False)
    assert [result.problem for result in report] == [large, small]
    assert report[0].best is not None
    assert report[1].best is None


def test_ctrl_c_during_several_searches_reports_all_that_was_found(bench: Bench) -> None:
    first, second = problem(4096), problem(1024)

    def cost(plan: Plan) -> float | BaseException:
        return KeyboardInterrupt() if bench.trials[-1][0] == second else 1.0

    bench.cost = cost
    with pytest.raises(KeyboardInterrupt) as caught:
        search.search_all([(first, GPU), (second, GPU)], progress=False)
    assert [result.problem for result in caught.value.report] == [first, second]
    assert [result.complete for result in caught.value.report] == [True, False]


def fact(**changes: object) -> tuple[KernelFacts, ...]:
    usual = {
        "kernel": "k", "programs": 132, "warps": 4, "registers": 64, "spilled": 0, "shared": 0, "resident": 8,
        "occupancy": 0.5, "waves": 1.0, "loads": {"x": 16}, "stores": {"y": 16}, "moved": 100,
        "instructions": None,
    }  # fmt: skip
    return (KernelFacts(**{**usual, **changes}),) * 2  # type: ignore[arg-type]


def test_what_the_compiler_rules_out_is_not_timed(bench: Bench) -> None:
    """Which is what does not compile, and what is no better than another of its driver in any fact."""
    same = replace(PLANS[0], window=1)
    assert ahead.dominated(FORWARD, {PLANS[0]: fact(), same: fact()}) == set()
    assert ahead.dominated(FORWARD, {PLANS[0]: fact(spilled=8), same: fact()}) == {PLANS[0]}
    better = fact(spilled=8, occupancy=0.75)
    assert ahead.dominated(FORWARD, {PLANS[0]: better, same: fact()}) == set()
    other = replace(same, driver="streamed")
    assert ahead.dominated(FORWARD, {PLANS[0]: fact(spilled=8), other: fact()}) == set()

    splits = [plan for plan in PLANS if plan.driver == "split"]
    worse = fact(spilled=8, occupancy=0.1, moved=200, resident=1, waves=1.01, loads={"x": 2})
    facts = {plan: fact(resident=64) if plan == splits[-1] else worse for plan in splits}
    facts[splits[2]] = "CompilationError: no\nmore"
    bench.facts[FORWARD, GPU] = facts
    (result,) = search.search_all([(FORWARD, GPU)], progress=False)
    status = {row.plan: row.status for row in result.rows}
    assert status[splits[2]] == "failed: CompilationError: no"
    timed = {plan for _, plan, _ in bench.trials}
    assert status[PLANS[0]] == "timed"  # the heuristic's always is
    assert result.complete
    dominated = ahead.dominated(FORWARD, facts) - {PLANS[0]}
    assert dominated
    assert {plan for plan in PLANS if status[plan] == "dominated"} == dominated
    assert not timed & {*dominated, splits[2]}


def test_half_of_a_budget_is_for_compilation_of_what_is_new(bench: Bench) -> None:
    bench.cost = lambda plan: 1.0
    search.search_all([(FORWARD, GPU)], progress=False)
    started = bench.now
    search.search_all([(FORWARD, GPU), (problem(49), GPU)], budget=10.0, progress=False)
    (wanted, options) = bench.compilations[1]
    assert [pair[:2] for pair in wanted] == [(problem(49), GPU)]
    assert options["deadline"] == pytest.approx(started + 5.0)
    search.search_all([(FORWARD, GPU)], again=True, progress=False)
    assert [pair[0] for pair in bench.compilations[2][0]] == [FORWARD]


def test_without_a_gpu_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    layer = Layer()
    for verb in (tune, compile_ahead):
        with pytest.raises(RuntimeError, match=r"nothing to .*sees no GPU.*inspect"):
            verb(layer, torch.ones(2, 3136))
    assert layer.calls == 0


def test_compile_ahead_compiles_what_a_step_runs_and_launches_nothing(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted: list[object] = []
    launched: list[object] = []

    def compile_plans(plans: list[object], **options: object) -> object:
        wanted.extend(plans)
        return {(FORWARD, GPU): {PLANS[0]: fact()}, (problem(49), GPU): {PLANS[1]: answer}}

    class Launching(Layer):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            launch.run("kernel", 1, (), {})
            return super().forward(x)

    monkeypatch.setattr(ahead, "compile_plans", compile_plans)
    monkeypatch.setattr(launch, "run", lambda *arguments: launched.append(arguments))
    answer: object = fact()
    assert compile_ahead(Launching(), torch.ones(2, 3136)) == 2
    assert wanted == [(p, GPU, (heuristic(p, GPU),)) for p in (FORWARD, problem(training=False))]
    assert launched == []
    launch.run("kernel")
    assert len(launched) == 1
    answer = "CompilationError: no"
    with pytest.raises(
        RuntimeError, match="1 plans do not compile, the first: CompilationError: no"
    ):
        compile_ahead(Layer(), torch.ones(2, 3136))


@pytest.mark.parametrize("model", [nn.Identity(), Layer(DEVICES["interpreter"])])
def test_a_model_without_our_layers_on_a_gpu_is_an_error(bench: Bench, model: nn.Module) -> None:
    with pytest.raises(RuntimeError, match=r"nothing to tune.*triton_bn\.convert.*inspect"):
        tune(model, torch.ones(2, 8))


# ---- tables --------------------------------------------------------------------------------------


def test_a_table_moves_to_another_machine(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    search.search(FORWARD, GPU, progress=False)
    assert memory.export_table(tmp_path / "table.json", GPU) == 1
    monkeypatch.setenv("TRITON_BN_CACHE_DIR", str(tmp_path / "elsewhere"))
    forget(monkeypatch)
    assert resolve.resolve(FORWARD, GPU).source == "heuristic"
    assert memory.import_table(tmp_path / "table.json") == 1
    plan = resolve.resolve(FORWARD, GPU)
    assert (plan, plan.source) == (PLANS[-1], "disk")


def test_an_import_keeps_what_only_this_machine_knows(bench: Bench, tmp_path: Path) -> None:
    search.search(FORWARD, GPU, progress=False)
    memory.export_table(tmp_path / "table.json", GPU)
    other = problem(49)
    bench.cost = lambda plan: 1.0
    search.search(other, GPU, progress=False)
    memory.import_table(tmp_path / "table.json")
    assert set(stored()) == {str(FORWARD), str(other)}


def break_fingerprint(data: dict[str, object]) -> None:
    data["fingerprint"] = "other"


def break_plan(data: dict[str, object]) -> None:
    data["entries"]["another"] = {"plan": {"driver": "split"}}


def break_device(data: dict[str, object]) -> None:
    data["about"]["device"] = {"name": "GPU"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (break_fingerprint, "other kernels or another Triton"),
        (break_plan, "'another' has no plan"),
        (break_device, "cannot be imported"),
        (lambda data: data.update(format="?"), "not in the format"),
    ],
)
def test_a_table_that_does_not_fit_is_refused_whole(
    bench: Bench, tmp_path: Path, change: Callable[[dict[str, object]], None], message: str
) -> None:
    search.search(FORWARD, GPU, progress=False)
    table = tmp_path / "table.json"
    memory.export_table(table, GPU)
    data = json.loads(table.read_text())
    change(data)
    table.write_text(json.dumps(data))
    memory.table_path(GPU).unlink()
    with pytest.raises(ValueError, match=message):
        memory.import_table(table)
    assert not memory.table_path(GPU).exists()


def test_there_must_be_something_to_export(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing was tuned yet for NVIDIA H200"):
        memory.export_table(tmp_path / "table.json", GPU)


def test_every_shipped_table_holds_plans_of_the_gpu_it_is_named_for() -> None:
    for path in (Path(memory.__file__).parent / "tables").glob("*.json"):
        document = cache.read(path)
        assert path.stem == cache.slug(document.about["device"]["name"])
        for entry in document.entries.values():
            Plan.from_dict(entry["plan"], "shipped")
