"""A store on disk: readable JSON files that many processes read and write. Knows no kernels.

A file is one JSON object, sorted and indented::

    {"about": {...}, "entries": {...}, "fingerprint": "...", "format": "triton_bn cache 1"}

``fingerprint`` is the caller's version of what the entries mean, ``about`` is for the reader.

What may be relied upon
    - A reader sees a whole file or none: writing goes to a temporary file beside it, which then
      takes its place.
    - Two writers lose nothing: each reads, merges and writes while it holds a lock of the operating
      system, and none writes without it. The lock ends with its process, so that no stale one is ever
      left; the temporary file of a writer that was killed is removed by the next one.
    - A file that is corrupt, not ours or of another fingerprint is a miss, and the next write
      replaces it. Where the folder cannot be written, or the disk is full, what is there stays as
      it is. Either way there is one warning for a process and file, and never an exception.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
import secrets
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Document", "Store", "folder", "lock", "read", "slug", "warn_once", "write"]

logger = logging.getLogger(__name__)

FORMAT = "triton_bn cache 1"

#: Seconds that a writer waits for other writers, who take milliseconds each.
PATIENCE = 30.0

#: Levels that a file's entries may be nested by. Some of what reads or writes them is recursive.
LEVELS = 32


@dataclass(frozen=True)
class Document:
    """What a file holds."""

    fingerprint: str
    entries: dict[str, Any]
    about: dict[str, Any] = field(default_factory=dict)


def folder() -> Path:
    """Where files are kept: ``TRITON_BN_CACHE_DIR`` (``~`` is the home), else within the user's cache folder."""
    chosen = os.environ.get("TRITON_BN_CACHE_DIR")
    if chosen:
        return Path(os.path.expanduser(chosen))
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
    else:
        base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "triton_bn"
    try:
        home = Path.home()
    except RuntimeError:  # a container's user without a home
        return Path(tempfile.gettempdir()) / "triton_bn"
    if sys.platform == "win32":
        return home / "AppData" / "Local" / "triton_bn"
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "triton_bn"


def slug(text: str) -> str:
    """A text as a file's name: lower case, everything but letters, digits and dots as ``-``."""
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-.")


_warned: set[tuple[Path, str]] = set()


def warn_once(path: Path, topic: str, message: str) -> None:
    """Warns about a file, unless this process has warned about the same topic of it before."""
    if (path, topic) not in _warned:
        _warned.add((path, topic))
        logger.info("%s: %s", path, message)
        warnings.warn(f"{path}: {message}", RuntimeWarning, stacklevel=2)


def read(path: Path) -> Document:
    """Reads a file.

    Raises:
        ValueError: for a file that is not JSON, or not in this format.
        OSError: for one that cannot be read.
    """
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError, MemoryError) as error:
        raise ValueError(f"not readable as JSON ({error})") from error
    if _nested(data) > LEVELS:
        raise ValueError(f"nested more than {LEVELS} levels deep")
    if (
        not isinstance(data, dict)
        or data.get("format") != FORMAT
        or not isinstance(data.get("fingerprint"), str)
        or not isinstance(data.get("entries"), dict)
        or not isinstance(data.get("about"), dict)
    ):
        raise ValueError(f"not in the format {FORMAT!r}")
    return Document(data["fingerprint"], data["entries"], data["about"])


def _nested(data: Any) -> int:
    """How deep lists and objects are nested, counted up to one more than :data:`LEVELS`."""
    levels, level = 0, [data]
    while level and levels <= LEVELS:
        inside = [each for each in level if isinstance(each, list | dict)]
        level = [
            value
            for each in inside
            for value in (each.values() if isinstance(each, dict) else each)
        ]
        levels += bool(inside)
    return levels


def write(path: Path, document: Document) -> None:
    """Writes a file, which appears whole or not at all. Makes its folder.

    Raises:
        OSError: for a folder that cannot be written, a full disk; what was there before remains.
    """
    content = {
        "format": FORMAT,
        "fingerprint": document.fingerprint,
        "about": document.about,
        "entries": document.entries,
    }
    text = json.dumps(content, indent=2, sort_keys=True) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise


@contextmanager
def lock(path: Path, timeout: float, until: Callable[[], bool] = lambda: False) -> Iterator[bool]:
    """Waits for an exclusive lock on a file, holds it, and yields whether it does.

    Args:
        path: the file to lock; made where it is missing, and left there.
        timeout: seconds to wait at most.
        until: ends the wait early, without the lock.

    Yields:
        ``False`` after ``timeout`` or ``until()``. ``True`` with the lock, and also where the file
        system offers none: nothing can be shared there, so there is nobody to wait for.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError:
        yield True
        return
    try:
        deadline, pause = time.monotonic() + timeout, 0.001
        while not (held := _try_lock(descriptor)):
            if until() or time.monotonic() > deadline:
                break
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
        yield held
    finally:
        os.close(descriptor)  # which ends the lock


if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> bool:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _try_lock(descriptor: int) -> bool:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            return True
        return True


@dataclass
class Store:
    """One file of entries, as the module's docstring describes it.

    Args:
        path: the file.
        fingerprint: what its entries must have been written under; ``None`` takes any, for
            reading only.
        about: written beside the entries, for the reader.
    """

    path: Path
    fingerprint: str | None
    about: dict[str, Any] = field(default_factory=dict)
    _seen: tuple[int, ...] = field(default=(), init=False, repr=False)
    _entries: dict[str, Any] = field(default_factory=dict, init=False, repr=False)

    def entries(self) -> Mapping[str, Any]:
        """What the file holds now: nothing if missing, corrupt, not ours or of another version."""
        try:
            status = self.path.stat()
        except OSError:
            return {}
        seen = (status.st_mtime_ns, status.st_size, status.st_ino)
        if seen != self._seen:
            try:
                self._entries = self._read()
            except OSError as error:
                warn_once(self.path, "read", f"ignored: {error}")
                return {}
            self._seen = seen
        return self._entries

    def _read(self) -> dict[str, Any]:
        try:
            document = read(self.path)
        except FileNotFoundError:
            return {}
        except ValueError as error:
            warn_once(self.path, "read", f"ignored, and replaced at the next write: {error}")
            return {}
        if self.fingerprint not in (None, document.fingerprint):
            warn_once(
                self.path,
                "read",
                f"ignored, and replaced at the next write: it was written under version "
                f"{document.fingerprint}, this is {self.fingerprint}",
            )
            return {}
        return document.entries

    def update(self, entries: Mapping[str, Any]) -> bool:
        """Adds entries, replacing those of the same keys; whether they are on disk now."""
        assert self.fingerprint is not None
        with lock(self.path.with_name(self.path.name + ".lock"), PATIENCE) as held:
            if not held:
                problem = f"another process has been writing for {PATIENCE:.0f} s"
                warn_once(self.path, "write", f"not written, kept in memory only: {problem}")
                return False
            try:
                for abandoned in self.path.parent.glob(f".{glob.escape(self.path.name)}.*.tmp"):
                    with suppress(OSError):  # whoever wrote it without the lock is gone
                        abandoned.unlink()
                # A file that is there but cannot be read is not replaced: its entries may be sound.
                merged = {**self._read(), **entries}
                write(self.path, Document(self.fingerprint, merged, self.about))
            except OSError as error:
                warn_once(self.path, "write", f"not written, kept in memory only: {error}")
                return False
        return True
