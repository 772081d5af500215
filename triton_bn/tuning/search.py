"""How the fastest plan of a problem is found: timing, candidates, one process at a time.

Several processes
    A search holds a lock beside the GPU's file. Who finds it taken waits until the problem's plan
    is in the file, and reads it: the ranks of a job tune each problem once, and two processes never
    time on one GPU at once. There is no collective: ranks may meet different problems, or the same
    ones in another order (a last short batch, the stages of a pipeline), and a collective inside a
    forward pass would then wait forever. So machines without a shared folder search each on their
    own, and may choose different plans. That costs nothing but the search: a plan decides how a
    rank computes its own moments, and what ranks exchange is merged by all of them from the same
    numbers in the same order.
"""

from __future__ import annotations

import logging
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

import torch

from triton_bn.plan import Device, Plan, candidates, heuristic, with_source
from triton_bn.problem import Problem
from triton_bn.tuning import cache, memory
from triton_bn.tuning.results import Report, Result, Row, Timing, progress_bar

if TYPE_CHECKING:
    from triton_bn.tuning.ahead import Facts

logger = logging.getLogger(__name__)

__all__ = [
    "WITHOUT_GPU",
    "Interrupted",
    "measure",
    "on_a_gpu",
    "require_gpu",
    "search",
    "search_all",
    "search_once",
    "time_cold",
]

WITHOUT_GPU = (
    "Without a GPU, `python -m triton_bn inspect` shows what the compiler makes of the plans: "
    "registers, spills, shared memory, width of accesses."
)

#: ``timer(run, n)``: the milliseconds of each of n calls of run, each with cold caches.
Timer = Callable[[Callable[[], None], int], list[float]]


class Run(Protocol):
    """What a trial gives: a problem under a plan, on scratch tensors (:class:`triton_bn.tuning.trial.Trial`)."""

    def __call__(self) -> None:
        """Runs once."""

    def observe(self) -> None:
        """Runs once, and keeps what comes out."""

    def wrong(self) -> str:
        """What is wrong with what came out; nothing is ``""``."""


#: ``trial(problem, plan, device)``: what runs the problem under the plan.
Trial = Callable[[Problem, Plan, Device], Run]

#: Runs that decide whether a candidate is hopeless, and how much slower than the best it then is.
PROBE, HOPELESS = 5, 1.5
#: Milliseconds of timed runs a candidate, and the fewest and most runs that may be.
SPEND, FEWEST, MOST = 40.0, 20, 200
#: So many of the fastest are timed again at the end, in turn: clocks drift during a search.
FINALISTS = 3
#: Seconds to wait for another process's search before going on without.
PATIENCE = 300.0


# ---- Measuring -----------------------------------------------------------------------------------


def time_cold(run: Callable[[], None], runs: int) -> list[float]:
    """The milliseconds of each of ``runs`` calls on the current GPU, its L2 emptied before each."""
    from triton.runtime import driver

    gpu = driver.active.get_device_interface()
    buffer = driver.active.get_empty_cache_for_benchmark()
    events = [[gpu.Event(enable_timing=True) for _ in "se"] for _ in range(runs)]
    for _ in range(8):
        # A head start for the host: were the GPU to wait for a launch, the wait would be timed.
        driver.active.clear_cache(buffer)
    for start, end in events:
        driver.active.clear_cache(buffer)
        start.record()
        run()
        end.record()
    gpu.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def measure(
    run: Run,
    *,
    timer: Timer | None = None,
    limit: float = math.inf,
    spend: float = SPEND,
) -> Timing:
    """Times ``run``, which is called once before (it compiles then).

    Unless it is stopped, its results are kept before the first and after the last of the runs whose times
    count: under the same conditions, but not timed, for that takes time.

    Args:
        run: what to time; it must be repeatable.
        timer: how to time; :func:`time_cold` by default.
        limit: milliseconds; a run whose first few exceed it by their median is stopped there.
        spend: milliseconds that the timed runs should take together.
    """
    timer = timer or time_cold
    run()
    times = timer(run, PROBE)
    estimate = statistics.median(times)
    if estimate > limit:
        return Timing.of(times, stopped=True)
    runs = min(max(int(spend / max(estimate, 1e-4)), FEWEST), MOST) + 2
    ordered: list[Callable[[], None]] = [run.observe, *[run] * (runs - 2), run.observe]
    steps = iter(ordered)
    return Timing.of(timer(lambda: next(steps)(), runs)[1:-1])


# ---- Searching -----------------------------------------------------------------------------------


def require_gpu(verb: str) -> None:
    """Refuses where there is none, before anything runs.

    Raises:
        RuntimeError: then.
    """
    if not torch.cuda.is_available():
        raise RuntimeError(f"nothing to {verb}: PyTorch sees no GPU. {WITHOUT_GPU}")


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a search: ``report`` holds what was found until then, and is remembered."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report


def _launch_trial(problem: Problem, plan: Plan, device: Device) -> Run:
    from triton_bn.tuning import trial  # Triton is not there on every platform

    return trial.Trial(problem, plan, device)


def _forget() -> None:
    trial: Any = sys.modules.get("triton_bn.tuning.trial")
    if trial is not None:
        trial.forget()


def search(
    problem: Problem,
    device: Device,
    *,
    budget: float | None = None,
    progress: bool = True,
    timer: Timer | None = None,
    trial: Trial | None = None,
    title: str | None = None,
    facts: Facts | None = None,
) -> Result:
    """Times every candidate for a problem, on scratch tensors, and remembers the fastest.

    A candidate that does not compile or launch is a row with its error. One whose results are wrong is a row
    that says so, is never the best, and a warning tells of it; what does not fit in memory together with a
    second result to compare is not checked, and cannot win either. No other process is kept
    from timing on the GPU meanwhile (:func:`search_all` does that).

    Args:
        problem, device: what to tune, and the facts of the current GPU.
        budget: seconds; candidates whose turn would come later are not reached.
        progress: show a bar (with rich) or a line, on stderr.
        timer, trial: as :data:`Timer` and :data:`Trial`; the GPU's by default.
        title: of the bar; the problem by default.
        facts: what the compiler says of the candidates (:func:`triton_bn.tuning.ahead.compile_plans`): what does
            not compile, or is dominated by another candidate, is not timed.

    Raises:
        Interrupted: for Ctrl-C, after what was found has been stored.
    """
    deadline = math.inf if budget is None else monotonic() + budget
    trial = trial or _launch_trial
    untuned = heuristic(problem, device)
    known = memory.on_disk(problem, device)
    # The plan of an earlier search comes first: a shorter one must not replace it unseen.
    order = dict.fromkeys([*([known] if known else []), untuned, *candidates(problem, device)])
    plans = [with_source(plan, "heuristic" if plan == untuned else "candidate") for plan in order]
    rows = {plan: Row(plan, "not reached") for plan in plans}
    for plan, answer in (facts or {}).items():
        if isinstance(answer, str) and plan in rows:
            rows[plan] = Row(
                plan, f"failed: {(answer.strip() or 'no message').splitlines()[0][:200]}"
            )
    if facts:
        from triton_bn.tuning import ahead

        for plan in ahead.dominated(problem, facts):
            if plan in rows and plan not in (untuned, known):
                rows[plan] = Row(plan, "dominated")
    best, interrupted = math.inf, False
    logger.info("searching on %s: %s: %d plans", device.name, problem, len(plans))

    def attempt(plan: Plan) -> Row:
        try:
            run = trial(problem, plan, device)
            timing = measure(run, timer=timer, limit=HOPELESS * best)
            if timing.stopped:
                return Row(plan, "stopped early", timing)
            wrong = run.wrong()
        except torch.OutOfMemoryError as error:
            logger.info("not checked for %s: %s: %s", problem, plan, error)
            return Row(plan, "not checked: out of memory")
        except Exception as error:  # whatever a compiler or driver may raise
            text = (str(error).strip() or "no message").splitlines()[0]
            logger.info("refused for %s: %s: %s: %s", problem, plan, type(error).__name__, text)
            return Row(plan, f"failed: {type(error).__name__}: {text[:200]}")
        return Row(plan, f"wrong result: {wrong}") if wrong else Row(plan, "timed", timing)

    def timed() -> list[Row]:
        return sorted((row for row in rows.values() if row.status == "timed"), key=_median)

    try:
        with progress_bar(title or str(problem), len(plans), progress) as advance:
            for plan in plans:
                if monotonic() >= deadline:
                    break
                if rows[plan].status != "not reached":
                    advance(best)
                    continue
                rows[plan] = row = attempt(plan)
                if row.status == "timed":
                    best = min(best, _median(row))
                advance(best)
            for first in timed()[:FINALISTS]:
                if monotonic() >= deadline:
                    break
                again = attempt(first.plan)
                # Disturbances only ever add time: the faster of the two counts. One wrong result is enough.
                if again.status.startswith("wrong") or (
                    again.status == "timed" and _median(again) < _median(first)
                ):
                    rows[first.plan] = again
    except KeyboardInterrupt:
        interrupted = True
    finally:
        _forget()
    _warn(problem, device, rows.values())
    others = sorted((row for row in rows.values() if row.status != "timed"), key=_median)
    ranked = (*timed(), *others)
    complete = all(row.status != "not reached" for row in ranked)
    result = Result(problem, device, ranked, complete)
    _remember(result)
    logger.info("found (best ms, gain, problem: plan): %s", result.summary().strip())
    if interrupted:
        raise Interrupted(Report([result]))
    return result


def _warn(problem: Problem, device: Device, rows: Iterable[Row]) -> None:
    """Tells of wrong results, and first of the heuristic's own."""
    wrong = [row for row in rows if row.status.startswith("wrong")]
    for row in wrong:
        if row.plan.source == "heuristic":
            warnings.warn(
                f"the plan that {problem} runs by untuned gives a wrong result on {device.name}: {row.plan}: "
                f"{row.status}. Please report it.",
                RuntimeWarning,
                stacklevel=3,
            )
    if wrong:
        listed = "; ".join(f"{row.plan}: {row.status}" for row in wrong[:3])
        warnings.warn(
            f"{len(wrong)} plans for {problem} give wrong results on {device.name}, and are not used: {listed}",
            RuntimeWarning,
            stacklevel=3,
        )


def _median(row: Row) -> float:
    return math.inf if row.timing is None else row.timing.median


def _remember(result: Result) -> None:
    best = result.best
    if best is None or best.timing is None:
        return
    entry = {
        "plan": best.plan.as_dict(),
        "median": round(best.timing.median, 6),
        "p20": round(best.timing.p20, 6),
        "p80": round(best.timing.p80, 6),
        "runs": best.timing.runs,
        "complete": result.complete,
    }
    memory.store_of(result.device).update({str(result.problem): entry})
    memory.keep(result.problem, result.device, with_source(best.plan, "tuned now"))


def _remembered(problem: Problem, device: Device) -> Result | None:
    """The result of an earlier complete search, as far as it is on disk: its best row."""
    entry = memory.store_of(device).entries().get(str(problem))
    if not isinstance(entry, dict) or entry.get("complete") is not True:
        return None
    plan = memory.on_disk(problem, device)
    try:
        median, p20, p80 = (float(entry[key]) for key in ("median", "p20", "p80"))
        timing = Timing(median, p20, p80, int(entry["runs"]))
    except (KeyError, TypeError, ValueError, OverflowError):
        return None
    if plan is None or not all(map(math.isfinite, (median, p20, p80))):
        return None
    return Result(problem, device, (Row(plan, "remembered", timing),), complete=True)


def search_once(problem: Problem, device: Device, *, again: bool = False, **options: Any) -> Result:
    """:func:`search`, one process at a time, unless the result of a complete one is on disk.

    Raises:
        TimeoutError: when another process has been searching for too long.
    """

    def known() -> Result | None:
        return None if again else _remembered(problem, device)

    if torch.cuda.is_initialized():
        # Whoever holds the lock must not wait for other ranks: collectives under way end first.
        torch.cuda.synchronize()
    path = memory.store_of(device).path.with_suffix(".search.lock")
    with cache.lock(path, PATIENCE, until=lambda: known() is not None) as held:
        result = known()
        if result is not None and result.best is not None:
            memory.keep(problem, device, result.best.plan)
            return result
        if not held:
            raise TimeoutError(f"another process has been tuning for {PATIENCE:.0f} s")
        return search(problem, device, **options)


def on_a_gpu(met: Iterable[tuple[Problem, Device]], verb: str) -> list[tuple[Problem, Device]]:
    """The problems that were met on a GPU, the largest first.

    Raises:
        RuntimeError: where there are none.
    """
    found = [pair for pair in met if pair[1].arch != "interpreter"]
    if not found:
        raise RuntimeError(
            f"nothing to {verb}: no batch norm of triton_bn ran on a GPU. Stock layers must be "
            "converted (triton_bn.convert), and model and inputs be on a GPU. " + WITHOUT_GPU
        )
    return sorted(found, key=lambda pair: -pair[0].numel)


def _compiled(
    wanted: list[tuple[Problem, Device, tuple[Plan, ...]]], **options: Any
) -> Mapping[tuple[Problem, Device], Facts]:
    from triton_bn.tuning import ahead  # Triton is not there on every platform

    return ahead.compile_plans(wanted, **options)


def search_all(
    met: Iterable[tuple[Problem, Device]],
    *,
    again: bool = False,
    budget: float | None = None,
    progress: bool = True,
) -> Report:
    """Searches for problems that :func:`triton_bn.tuning.memory.record` has collected."""
    found = on_a_gpu(met, "tune")
    start = monotonic()
    deadline = math.inf if budget is None else start + budget
    results: list[Result] = []
    try:
        new = [
            (problem, device, candidates(problem, device))
            for problem, device in found
            if again or _remembered(problem, device) is None
        ]
        # What is not compiled after half of the time is compiled when its turn comes.
        facts = _compiled(
            new, deadline=math.inf if budget is None else start + budget / 2, progress=progress
        )
        for number, (problem, device) in enumerate(found, start=1):
            results.append(
                search_once(
                    problem,
                    device,
                    again=again,
                    budget=None if budget is None else max(deadline - monotonic(), 0.0),
                    progress=progress,
                    title=f"{number}/{len(found)} {problem}",
                    facts=facts.get((problem, device)),
                )
            )
    except Interrupted as error:
        raise Interrupted(Report([*results, *error.report])) from None
    except KeyboardInterrupt:
        raise Interrupted(Report(results)) from None
    return Report(results)
