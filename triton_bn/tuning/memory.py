"""What is known about the plans of problems, and where it is kept.

The memo of this process; the user's file on disk; the tables shipped for GPUs.

Files
    ``<cache folder>/<gpu>_triton-<version>.json`` (see :mod:`triton_bn.tuning.cache`), valid for the
    kernels' source as it is (:func:`fingerprint`). A plan from a file is launched only if it equals
    one of the problem's candidates: no file can launch what a search would not.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, KeysView
from contextlib import contextmanager
from dataclasses import asdict
from functools import cache as cached
from pathlib import Path

import torch

from triton_bn.plan import Device, Plan, candidates, heuristic, with_source
from triton_bn.problem import Problem
from triton_bn.tuning import cache

__all__ = [
    "export_table",
    "fingerprint",
    "import_table",
    "keep",
    "note",
    "on_disk",
    "record",
    "store_of",
    "table_path",
    "untimed",
]

#: The plans in use by problem and device. While somebody records, another one stands here, so that every
#: problem takes the slow way and leaves its key: the fast way needs no check for a recorder.
memo: dict[tuple[Problem, Device], Plan] = {}

#: What each :func:`record` that is under way has seen.
_records: list[dict[tuple[Problem, Device], None]] = []
_kept = memo
_lock = threading.Lock()


@contextmanager
def record() -> Iterator[KeysView[tuple[Problem, Device]]]:
    """Collects what :func:`~triton_bn.tuning.resolve.resolve` is asked for, by any thread.

    It is a live view, and each problem is there once. Meanwhile nothing is searched, whatever the environment
    says. Several may record at once: each sees what is asked for while it does.
    """
    global memo, _kept
    seen: dict[tuple[Problem, Device], None] = {}
    with _lock:
        if not _records:
            _kept = memo
        _records.append(seen)
        memo = {}
    try:
        yield seen.keys()
    finally:
        with _lock:
            _records[:] = [other for other in _records if other is not seen]
            if not _records:
                memo = _kept


def keep(problem: Problem, device: Device, plan: Plan) -> None:
    """A plan that was found, for this process."""
    with _lock:
        memo[problem, device] = plan
        if _records:
            _kept[problem, device] = plan


def note(problem: Problem, device: Device) -> bool:
    """Tells whoever records of a problem; whether anybody does."""
    records = tuple(_records)
    for seen in records:
        seen[problem, device] = None
    return bool(records)


# ---- Files ---------------------------------------------------------------------------------------


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
    try:
        import triton
    except ModuleNotFoundError:  # its plans may be asked for all the same
        return "none"
    return str(triton.__version__)


def table_path(device: Device) -> Path:
    """The file of a GPU in the cache folder."""
    return store_of(device).path


def store_of(device: Device) -> cache.Store:
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


def on_disk(problem: Problem, device: Device) -> Plan | None:
    return _accepted(store_of(device), problem, device, "disk")


def untimed(problem: Problem, device: Device) -> Plan:
    """The plan of a problem that nobody has timed here: the shipped one or the heuristic's."""
    return _accepted(_shipped_table(device.name), problem, device, "shipped") or heuristic(
        problem, device
    )


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


# ---- Tables --------------------------------------------------------------------------------------


def export_table(path: str | Path, device: Device) -> int:
    """Writes what is remembered for a GPU to a file; returns the number of problems.

    Raises:
        ValueError: if nothing is.
        OSError: if the file cannot be written.
    """
    store = store_of(device)
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
    store = store_of(device)
    if not store.update(document.entries):
        raise OSError(f"{store.path} could not be written")
    with _lock:
        memo.clear()
        _kept.clear()
    return len(document.entries)
