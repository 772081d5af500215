"""Which plan runs a problem, and how the fastest one is found and remembered.

:func:`resolve` answers from memory, then from the user's file on disk, then from a table shipped
for the GPU, then by :func:`triton_bn.plan.heuristic`. Nothing is timed unless somebody asks: by
:func:`tune` or :func:`search`, on the command line, or by ``TRITON_BN_TUNE=1`` in the environment.
That searches when a problem that has no plan on disk is first met.

Files
    ``<cache folder>/<gpu>_triton-<version>.json`` (see :mod:`triton_bn.tuning.cache`), valid for the
    kernels' source as it is (:func:`fingerprint`). A plan from a file is launched only if it equals
    one of the problem's candidates: no file can launch what a search would not.

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

import copy
import hashlib
import math
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, KeysView
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache as cached
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from triton_bn.plan import Device, Plan, candidates, heuristic, with_source
from triton_bn.problem import Problem
from triton_bn.tuning import cache
from triton_bn.tuning.results import Report, Result, Row, Timing, progress_bar

__all__ = [
    "Interrupted",
    "export_table",
    "fingerprint",
    "import_table",
    "measure",
    "record",
    "resolve",
    "search",
    "search_all",
    "table_path",
    "time_cold",
    "tune",
]

WITHOUT_GPU = (
    "Without a GPU, `python -m triton_bn inspect` shows what the compiler makes of the plans: "
    "registers, spills, shared memory, width of accesses."
)

#: ``timer(run, n)``: the milliseconds of each of n calls of run, each with cold caches.
Timer = Callable[[Callable[[], None], int], list[float]]
#: ``trial(problem, plan, device)``: a closure that runs the problem under the plan, on scratch.
Trial = Callable[[Problem, Plan, Device], Callable[[], None]]

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
    run: Callable[[], None],
    *,
    timer: Timer | None = None,
    limit: float = math.inf,
    spend: float = SPEND,
) -> Timing:
    """Times ``run``, which is called once before (it compiles then).

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
    return Timing.of(timer(run, min(max(int(spend / max(estimate, 1e-4)), FEWEST), MOST)))


# ---- Resolving -----------------------------------------------------------------------------------

_memo: dict[tuple[Problem, Device], Plan] = {}
_recording = False


def resolve(problem: Problem, device: Device) -> Plan:
    """The plan to launch. Its ``source``: "heuristic", "shipped", "disk" or "tuned now"."""
    plan = _memo.get((problem, device))
    return _first(problem, device) if plan is None else plan


def _first(problem: Problem, device: Device) -> Plan:
    plan = _on_disk(problem, device)
    if plan is None and _search_wanted(device):
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            # Timing would break the capture. The next call outside of one searches.
            return _untimed(problem, device)
        plan = _search_at_first_use(problem, device)
    plan = plan or _untimed(problem, device)
    _memo[problem, device] = plan
    return plan


def _search_wanted(device: Device) -> bool:
    wanted = os.environ.get("TRITON_BN_TUNE") == "1" and not _recording
    return wanted and device.arch != "interpreter"


def _search_at_first_use(problem: Problem, device: Device) -> Plan | None:
    store = _store(device)
    try:
        best = _search_once(problem, device).best
    except TimeoutError as error:
        cache.warn_once(store.path, "wait", str(error))
        return None
    if best is None:
        cache.warn_once(store.path, str(problem), f"no candidate for {problem} could be timed")
        return None
    return with_source(best.plan, "disk" if best.status == "remembered" else "tuned now")


def _untimed(problem: Problem, device: Device) -> Plan:
    return _shipped(problem, device) or heuristic(problem, device)


@contextmanager
def record() -> Iterator[KeysView[tuple[Problem, Device]]]:
    """Collects what :func:`resolve` is asked for, by any thread: a live view, each problem once.

    Meanwhile nothing is searched, whatever the environment says. Not to be nested.
    """
    # The memo is put aside, so that every problem takes the slow way and leaves its key: the fast
    # way needs no check for a recorder.
    global _memo, _recording
    kept, _memo, _recording = _memo, {}, True
    try:
        yield _memo.keys()
    finally:
        _memo, _recording = kept, False


# ---- Where plans are kept ------------------------------------------------------------------------


@cached
def fingerprint() -> str:
    """A hash of what makes an old plan invalid: Triton's version, and how plans become kernels."""
    here = Path(__file__).parents[1]
    sources = [here / f"{name}.py" for name in ("problem", "plan", "launch")]
    sources += (here / "kernels").glob("*.py")
    digest = hashlib.sha256(_triton_version().encode())
    for path in sorted(sources):
        digest.update(b"\0" + path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


def table_path(device: Device) -> Path:
    """The file of a GPU in the cache folder."""
    return _store(device).path


def _store(device: Device) -> cache.Store:
    name = f"{cache.slug(device.name)}_triton-{cache.slug(_triton_version())}.json"
    return _open(cache.folder() / name, device)


@cached
def _open(path: Path, device: Device) -> cache.Store:
    about = {
        "device": asdict(device),
        "torch": str(torch.__version__),
        "triton": _triton_version(),
        "times": "milliseconds, caches cold",
    }
    return cache.Store(path, fingerprint(), about)


@cached
def _shipped_table(name: str) -> cache.Store:
    """The package's own table, of whatever fingerprint.

    It came with these kernels, and an entry that they do not know is refused like any other.
    """
    return cache.Store(Path(__file__).parent / "tables" / f"{cache.slug(name)}.json", None)


def _on_disk(problem: Problem, device: Device) -> Plan | None:
    return _accepted(_store(device), problem, device, "disk")


def _shipped(problem: Problem, device: Device) -> Plan | None:
    return _accepted(_shipped_table(device.name), problem, device, "shipped")


def _accepted(store: cache.Store, problem: Problem, device: Device, source: str) -> Plan | None:
    """The stored plan of a problem if it is one of its candidates: as that candidate itself."""
    entry = store.entries().get(str(problem))
    if entry is None:
        return None
    try:
        stored = Plan.from_dict(entry["plan"], source)
    except (TypeError, KeyError, ValueError, AttributeError):
        stored = None
    for plan in candidates(problem, device):
        if plan == stored:
            return with_source(plan, source)
    cache.warn_once(store.path, "plan", f"plan refused, none of its candidates: {problem}")
    return None


# ---- Searching -----------------------------------------------------------------------------------


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a search: ``report`` holds what was found until then, and is remembered."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report


def _launch_trial(problem: Problem, plan: Plan, device: Device) -> Callable[[], None]:
    from triton_bn import launch  # Triton is not there on every platform

    run: Callable[[], None] = launch.trial(problem, plan, device)
    return run


def search(
    problem: Problem,
    device: Device,
    *,
    budget: float | None = None,
    progress: bool = True,
    timer: Timer | None = None,
    trial: Trial | None = None,
    title: str | None = None,
) -> Result:
    """Times every candidate for a problem, on scratch tensors, and remembers the fastest.

    A candidate that does not compile or launch is a row with its error. No other process is kept
    from timing on the GPU meanwhile (:func:`tune` does that).

    Args:
        problem, device: what to tune, and the facts of the current GPU.
        budget: seconds; candidates whose turn would come later are not reached.
        progress: show a bar (with rich) or a line, on stderr.
        timer, trial: as :data:`Timer` and :data:`Trial`; the GPU's by default.
        title: of the bar; the problem by default.

    Raises:
        Interrupted: for Ctrl-C, after what was found has been stored.
    """
    deadline = math.inf if budget is None else monotonic() + budget
    trial = trial or _launch_trial
    untuned = heuristic(problem, device)
    known = _on_disk(problem, device)
    # The plan of an earlier search comes first: a shorter one must not replace it unseen.
    order = dict.fromkeys([*([known] if known else []), untuned, *candidates(problem, device)])
    plans = [with_source(plan, "heuristic" if plan == untuned else "candidate") for plan in order]
    rows = {plan: Row(plan, "not reached") for plan in plans}
    best, interrupted = math.inf, False

    def attempt(plan: Plan) -> Row:
        try:
            timing = measure(trial(problem, plan, device), timer=timer, limit=HOPELESS * best)
        except Exception as error:  # whatever a compiler or driver may raise
            text = (str(error).strip() or "no message").splitlines()[0]
            return Row(plan, f"failed: {type(error).__name__}: {text[:200]}")
        return Row(plan, "stopped early" if timing.stopped else "timed", timing)

    def timed() -> list[Row]:
        return sorted((row for row in rows.values() if row.status == "timed"), key=_median)

    try:
        with progress_bar(title or str(problem), len(plans), progress) as advance:
            for plan in plans:
                if monotonic() >= deadline:
                    break
                rows[plan] = row = attempt(plan)
                if row.status == "timed":
                    best = min(best, _median(row))
                advance(best)
            for first in timed()[:FINALISTS]:
                if monotonic() >= deadline:
                    break
                again = attempt(first.plan)
                # Disturbances only ever add time: the faster of the two counts.
                if again.status == "timed" and _median(again) < _median(first):
                    rows[first.plan] = again
    except KeyboardInterrupt:
        interrupted = True
    others = sorted((row for row in rows.values() if row.status != "timed"), key=_median)
    ranked = (*timed(), *others)
    complete = all(row.status != "not reached" for row in ranked)
    result = Result(problem, device, ranked, complete)
    _remember(result)
    if interrupted:
        raise Interrupted(Report([result]))
    return result


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
    _store(result.device).update({str(result.problem): entry})
    _memo[result.problem, result.device] = with_source(best.plan, "tuned now")


def _remembered(problem: Problem, device: Device) -> Result | None:
    """The result of an earlier complete search, as far as it is on disk: its best row."""
    entry = _store(device).entries().get(str(problem))
    if not isinstance(entry, dict) or entry.get("complete") is not True:
        return None
    plan = _on_disk(problem, device)
    try:
        median, p20, p80 = (float(entry[key]) for key in ("median", "p20", "p80"))
        timing = Timing(median, p20, p80, int(entry["runs"]))
    except (KeyError, TypeError, ValueError):
        return None
    if plan is None:
        return None
    return Result(problem, device, (Row(plan, "remembered", timing),), complete=True)


def _search_once(
    problem: Problem, device: Device, *, again: bool = False, **options: Any
) -> Result:
    """:func:`search`, one process at a time, unless the result of a complete one is on disk.

    Raises:
        TimeoutError: when another process has been searching for too long.
    """

    def known() -> Result | None:
        return None if again else _remembered(problem, device)

    if torch.cuda.is_initialized():
        # Whoever holds the lock must not wait for other ranks: collectives under way end first.
        torch.cuda.synchronize()
    path = _store(device).path.with_suffix(".search.lock")
    with cache.lock(path, PATIENCE, until=lambda: known() is not None) as held:
        result = known()
        if result is not None and result.best is not None:
            _memo[problem, device] = result.best.plan
            return result
        if not held:
            raise TimeoutError(f"another process has been tuning for {PATIENCE:.0f} s")
        return search(problem, device, **options)


# ---- Tuning what a model meets -------------------------------------------------------------------


def tune(
    model: nn.Module,
    *inputs: Any,
    again: bool = False,
    budget: float | None = None,
    progress: bool = True,
) -> Report:
    """Finds the fastest plan for every batch norm that a model runs, the largest first.

    A copy of the model runs once on the inputs: forward, and backward where gradients are enabled.
    So call it as the model will be called: in its mode (``train()`` or ``eval()``), under the same
    autocast or ``torch.no_grad()``, with a batch of the real size. The model, its statistics and
    gradients, the inputs and the random state stay as they were. A model with ``SyncBatchNorm`` is
    tuned by all ranks at once, as it is trained; of a ``DistributedDataParallel`` give the
    ``module``.

    Args:
        model: a model or one layer, on the current GPU.
        inputs: what it is called with.
        again: time also the problems whose search was completed before; else their result is one
            row, ``"remembered"``.
        budget: seconds for all searches together.
        progress: show it on stderr.

    Raises:
        RuntimeError: where no batch norm of this package ran on a GPU.
        TimeoutError: when another process has been tuning for too long.
        Interrupted: for Ctrl-C, after what was found has been stored.
    """
    return search_all(_problems_of(model, inputs), again=again, budget=budget, progress=progress)


def _problems_of(model: nn.Module, inputs: tuple[Any, ...]) -> list[tuple[Problem, Device]]:
    def own(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # The layers of a model see activations, which require gradients; an example seldom does.
        return value.detach().requires_grad_(value.is_floating_point() and torch.is_grad_enabled())

    model, inputs = copy.deepcopy(model), tree_map(own, inputs)
    gpus = {
        leaf.device for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor) and leaf.is_cuda
    }
    with torch.random.fork_rng(devices=sorted(gpus, key=str)), record() as seen:
        leaves = tree_leaves(model(*inputs))
        outputs = [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.requires_grad]
        if outputs:
            torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
    return list(seen)


def search_all(
    met: Iterable[tuple[Problem, Device]],
    *,
    again: bool = False,
    budget: float | None = None,
    progress: bool = True,
) -> Report:
    """:func:`tune` for problems that :func:`record` has collected."""
    found = sorted(
        (pair for pair in met if pair[1].arch != "interpreter"), key=lambda pair: -pair[0].numel
    )
    if not found:
        raise RuntimeError(
            "nothing to tune: no batch norm of triton_bn ran on a GPU. Stock layers must be "
            "converted (triton_bn.convert), and model and inputs be on a GPU. " + WITHOUT_GPU
        )
    deadline = math.inf if budget is None else monotonic() + budget
    results: list[Result] = []
    try:
        for number, (problem, device) in enumerate(found, start=1):
            results.append(
                _search_once(
                    problem,
                    device,
                    again=again,
                    budget=None if budget is None else max(deadline - monotonic(), 0.0),
                    progress=progress,
                    title=f"{number}/{len(found)} {problem}",
                )
            )
    except Interrupted as error:
        raise Interrupted(Report([*results, *error.report])) from None
    except KeyboardInterrupt:
        raise Interrupted(Report(results)) from None
    return Report(results)


# ---- Tables --------------------------------------------------------------------------------------


def export_table(path: str | Path, device: Device) -> int:
    """Writes what is remembered for a GPU to a file; returns the number of problems.

    Raises:
        ValueError: if nothing is.
        OSError: if the file cannot be written.
    """
    store = _store(device)
    entries = dict(store.entries())
    if not entries:
        raise ValueError(f"nothing was tuned yet for {device.name} ({store.path})")
    cache.write(Path(path), cache.Document(fingerprint(), entries, store.about))
    return len(entries)


def import_table(path: str | Path) -> int:
    """Adds an exported table to what is remembered for its GPU; returns the number of problems.

    The GPU need not be here. Where both know a problem, the table's plan counts.

    Raises:
        ValueError: for a file that is no such table, or is of other kernels or another Triton.
        OSError: if it cannot be read, or what is remembered cannot be written.
    """
    try:
        document = cache.read(Path(path))
        if document.fingerprint != fingerprint():
            raise ValueError(
                f"it was made by other kernels or another Triton (version {document.fingerprint}, "
                f"this is {fingerprint()})"
            )
        device = Device(**document.about["device"])
        for key, entry in document.entries.items():
            try:
                Plan.from_dict(entry["plan"], "disk")
            except (TypeError, KeyError, ValueError, AttributeError) as error:
                raise ValueError(f"{key!r} has no plan ({error})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} cannot be imported: {error}") from error
    store = _store(device)
    if not store.update(document.entries):
        raise OSError(f"{store.path} could not be written")
    _memo.clear()
    return len(document.entries)
