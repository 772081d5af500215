"""The store on disk: what it promises to readers and writers when things go wrong."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import warnings
from contextlib import ExitStack
from pathlib import Path

import pytest

from triton_bn.tuning import cache
from triton_bn.tuning.cache import Document, Store

#: ``cache.py`` needs nothing of the package, so a process that imports it alone starts at once.
PREAMBLE = f"import sys; sys.path.insert(0, {os.path.dirname(cache.__file__)!r}); import cache\n"


@pytest.fixture(autouse=True)
def unwarned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_warned", set())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "folder" / "gpu.json"


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREAMBLE + script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.PIPE, text=True)


def silent_entries(store: Store) -> dict[str, object]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return dict(store.entries())


def test_the_folder_is_the_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_BN_CACHE_DIR", str(tmp_path))
    assert cache.folder() == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TRITON_BN_CACHE_DIR", "~/plans")
    assert cache.folder() == tmp_path / "plans"
    monkeypatch.delenv("TRITON_BN_CACHE_DIR")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.folder() == tmp_path / "xdg" / "triton_bn"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.folder() == tmp_path / ".cache" / "triton_bn"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.folder() == tmp_path / "Library" / "Caches" / "triton_bn"

    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert cache.folder().name == "triton_bn"


def test_a_name_becomes_a_file_name() -> None:
    assert cache.slug("NVIDIA A100-SXM4-40GB / MIG 1g.5gb") == "nvidia-a100-sxm4-40gb-mig-1g.5gb"
    assert cache.slug("../..") == ""


def test_a_file_is_readable_sorted_and_found_again(path: Path) -> None:
    assert Store(path, "v1", {"gpu": "G"}).update({"b": {"y": 1, "x": [1.5]}, "a": None})
    text = path.read_text()
    assert text == json.dumps(json.loads(text), indent=2, sort_keys=True) + "\n"
    assert silent_entries(Store(path, "v1")) == {"a": None, "b": {"x": [1.5], "y": 1}}
    assert cache.read(path) == Document("v1", {"a": None, "b": {"x": [1.5], "y": 1}}, {"gpu": "G"})


def test_an_update_keeps_other_entries_and_replaces_its_own(path: Path) -> None:
    mine, other = Store(path, "v1"), Store(path, "v1")
    mine.update({"a": 1, "b": 1})
    assert mine.entries() == {"a": 1, "b": 1}
    other.update({"b": 2, "c": 2})
    assert mine.entries() == {"a": 1, "b": 2, "c": 2}


def test_a_missing_file_is_a_silent_miss(path: Path) -> None:
    assert silent_entries(Store(path, "v1")) == {}


def test_writers_in_many_processes_lose_nothing_and_readers_see_whole_files(path: Path) -> None:
    writers, each = 5, 12
    script = (
        "from pathlib import Path\n"
        "store = cache.Store(Path(sys.argv[1]), 'v1')\n"
        "for i in range(int(sys.argv[3])):\n"
        "    assert store.update({f'{sys.argv[2]}.{i}': 'x' * 2000})\n"
    )
    with ExitStack() as stack:
        processes = [stack.enter_context(start(script, path, w, each)) for w in range(writers)]
        while any(process.poll() is None for process in processes):
            silent_entries(Store(path, "v1"))  # a torn file would warn
        assert [process.returncode for process in processes] == [0] * writers
    expected = {f"{writer}.{i}" for writer in range(writers) for i in range(each)}
    assert set(Store(path, "v1").entries()) == expected
    assert sorted(p.name for p in path.parent.iterdir()) == ["gpu.json", "gpu.json.lock"]


#: What Python reads, but on some versions neither writes nor compares.
DEEP = (
    b'{"format": "triton_bn cache 1", "fingerprint": "v1", "about": {}, "entries": {"k": '
    + b'{"plan": [' * 50
    + b"1"
    + b"]}" * 50
    + b"}}"
)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\x00",
        b"[" * 100_000,
        DEEP,
        b"[]",
        b"null",
        b'{"a": 1}',
        b'{"format": "triton_bn cache 0", "fingerprint": "v1", "about": {}, "entries": {"k": 1}}',
        b'{"format": "triton_bn cache 1", "fingerprint": "v1", "about": {}, "entries": [1]}',
        b'{"format": "triton_bn cache 1", "fingerprint": "v1", "about": {}, "entries": {"k": 1}',
        b'{"format": "triton_bn cache 1", "fingerprint": "v0", "about": {}, "entries": {"k": 1}}',
    ],
    ids=[
        "empty",
        "cut",
        "binary",
        "deep",
        "nested",
        "list",
        "null",
        "foreign",
        "old",
        "odd",
        "torn",
        "v0",
    ],
)
def test_a_bad_file_is_a_miss_with_one_warning_and_is_replaced(path: Path, content: bytes) -> None:
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.warns(RuntimeWarning, match=r"gpu\.json: ignored") as caught:
        assert Store(path, "v1").entries() == {}
    assert len(caught) == 1
    assert silent_entries(Store(path, "v1")) == {}
    assert Store(path, "v1").update({"new": 1})
    assert silent_entries(Store(path, "v1")) == {"new": 1}


def test_any_fingerprint_can_be_asked_for(path: Path) -> None:
    Store(path, "v0").update({"k": 1})
    assert silent_entries(Store(path, None)) == {"k": 1}


def test_without_a_folder_work_goes_on_with_one_warning(tmp_path: Path) -> None:
    (tmp_path / "folder").write_text("a file in its place")
    store = Store(tmp_path / "folder" / "gpu.json", "v1")
    assert silent_entries(store) == {}
    with pytest.warns(RuntimeWarning, match="not written") as caught:
        assert [store.update({"k": n}) for n in range(2)] == [False, False]
    assert len(caught) == 1
    assert silent_entries(store) == {}


@pytest.mark.parametrize(
    ("call", "code"), [("fsync", errno.ENOSPC), ("replace", errno.EACCES), ("replace", errno.EROFS)]
)
def test_a_failed_write_leaves_what_was_there(
    path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    store = Store(path, "v1")
    store.update({"old": 1})
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.warns(RuntimeWarning, match=os.strerror(code)) as caught:
            assert [store.update({"new": n}) for n in range(2)] == [False, False]
    assert len(caught) == 1
    assert path.read_bytes() == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["gpu.json", "gpu.json.lock"]
    assert store.update({"new": 3})
    assert store.entries() == {"old": 1, "new": 3}


def test_a_file_that_cannot_be_read_is_not_replaced(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(path, "v1").update({"old": 1})

    def fail(self: Path) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", fail)
        store = Store(path, "v1")
        with pytest.warns(RuntimeWarning, match="ignored"):
            assert store.entries() == {}
        with pytest.warns(RuntimeWarning, match="not written"):
            assert not store.update({"new": 1})
    assert store.entries() == {"old": 1}


def test_a_lock_is_exclusive_and_ends_with_its_process(tmp_path: Path) -> None:
    file = tmp_path / "x.lock"
    script = (
        "from pathlib import Path\n"
        "with cache.lock(Path(sys.argv[1]), 0.0) as held:\n"
        "    print(held, flush=True)\n"
        "    sys.stdin.read()\n"
    )
    process = start(script, file)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "True\n"
        with cache.lock(file, 0.05) as held:
            assert not held
        polls = iter([False, False, True])
        with cache.lock(file, 60.0, until=lambda: next(polls)) as held:
            assert not held
        assert next(polls, "all asked") == "all asked"
    finally:
        process.kill()
        process.communicate()
    with cache.lock(file, 10.0) as held:
        assert held


def test_nobody_writes_without_the_lock(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(path, "v1")
    store.update({"old": 1})
    monkeypatch.setattr(cache, "PATIENCE", 0.02)
    with cache.lock(path.with_name("gpu.json.lock"), 0.0) as held:
        assert held
        with pytest.warns(RuntimeWarning, match="not written.*another process") as caught:
            assert [store.update({"new": n}) for n in range(2)] == [False, False]
    assert len(caught) == 1
    assert store.entries() == {"old": 1}


def test_what_a_killed_writer_left_is_removed(path: Path) -> None:
    script = (
        "from pathlib import Path\n"
        "import os\n"
        "os.replace = lambda *_: os._exit(9)\n"
        "cache.Store(Path(sys.argv[1]), 'v1').update({'lost': 1})\n"
    )
    process = start(script, path)
    process.communicate()
    assert process.returncode == 9
    assert [p.suffix for p in path.parent.iterdir() if p.name.startswith(".")] == [".tmp"]
    (path.parent / ".other.json.1.ab.tmp").write_text("another file's writer")
    assert Store(path, "v1").update({"k": 1})
    assert sorted(p.name for p in path.parent.iterdir()) == [
        ".other.json.1.ab.tmp", "gpu.json", "gpu.json.lock",
    ]  # fmt: skip


def test_a_file_system_without_locks_keeps_nobody_waiting(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with cache.lock(path.with_name("x.lock"), 60.0) as held:
        assert held
    assert Store(path, "v1").update({"k": 1})
