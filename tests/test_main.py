"""The command line, run as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import triton_bn
from triton_bn import route
from triton_bn.__main__ import COMMANDS, main
from triton_bn.commands import check, demo
from triton_bn.demo import digits

GPU = torch.cuda.is_available()
SHORT_DEMO = ["demo", "--epochs", "1", "--limit", "128"]


def command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m triton_bn``, as from a shell that knows nothing of the interpreter."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, "-m", "triton_bn", *arguments],
        cwd=Path(__file__).parent.parent,
        env={**env, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def exit_code(*arguments: str) -> Any:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return caught.value.code


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code("--version") == 0
    assert capsys.readouterr().out == f"triton_bn {triton_bn.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [[], ["nosuch"], ["info", "--nosuch"], ["plan", "32"], ["plan", "8x3", "--device", "K80"]],
)
def test_a_bad_command_line_exits_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(*arguments) == 2
    assert "usage: python -m triton_bn" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(name, "--help") == 0
    assert f"triton_bn {name}" in capsys.readouterr().out


def test_ctrl_c_exits_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(check, "run", interrupted)
    assert main(["check"]) == 130


def test_info_says_what_would_run_where() -> None:
    ran = command("info", TRITON_BN_CACHE_DIR="/somewhere")
    assert ran.returncode == 0, ran.stderr
    for text in (torch.__version__, triton_bn.__version__, "/somewhere", "PyTorch's own"):
        assert text in ran.stdout
    if GPU:
        assert torch.cuda.get_device_name() in ran.stdout
    if not GPU:
        ran = command("info", TRITON_INTERPRET="1")
        assert "the kernels, in Triton's interpreter" in ran.stdout


def test_plan_shows_forward_and_backward(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "32,64,56,56", "--device", "H200", "--activation", "relu"]) == 0
    out = capsys.readouterr().out
    x = torch.empty(32, 64, 56, 56, dtype=torch.bfloat16, device="meta")
    layer = triton_bn.BatchNorm2d(64, activation="relu", device="meta")
    assert out == f"{layer.plan(x, device='H200')}\n"
    assert out.startswith("NVIDIA H200 (sm_90), 132 processors, 50 MiB of L2\nforward training")
    main(["plan", "32x64x56x56", "--device", "h200", "--channels-last", "--eval"])
    assert capsys.readouterr().out != out
    assert main(["plan", "32x64x56x56", "9,4", "--device", "sm_90", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["direction"] for row in rows] == ["forward", "backward"] * 2
    assert all(row["device"] == "NVIDIA H100" and row["why"] for row in rows)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", "1,3"], "more than 1 value per channel"),
        (["plan", "8,3", "--channels-last"], "--channels-last"),
        (["plan", f"{10**20},3"], "no tensor of shape"),
        (["inspect", "8,3", "--batch", "2"], "--batch"),
        (["inspect", "8,3", "--channels-last"], "--channels-last"),
        (["inspect", "8,3", "--device", "interpreter"], "interpreter"),
        (["check", "1,3"], "more than 1 value per channel"),
    ],
)
def test_what_cannot_be_done_is_a_line_and_exits_2(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert message in captured.err


def test_without_triton_a_command_says_that_it_is_needed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "triton_bn.commands.info", raising=False)
    assert main(["info"]) == 2
    assert "needs Triton" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="has no such pipes")
def test_a_reader_that_leaves_ends_it_without_a_traceback() -> None:
    text = f"{sys.executable} -m triton_bn plan --help | true; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(
        ["bash", "-c", text.replace("--help", "--json " + "8x3 " * 2000)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 141, ran.stderr
    assert not ran.stderr


def test_the_shell_completes_commands_and_flags() -> None:
    pytest.importorskip("argcomplete")
    for typed, expected in (("pl", "plan"), ("plan --chan", "--channels-last")):
        line = f"triton-bn {typed}"
        environment = {
            "_ARGCOMPLETE": "1",
            "_ARGCOMPLETE_STDOUT_FILENAME": os.devnull,
            "COMP_LINE": line,
            "COMP_POINT": str(len(line)),
            "COMP_TYPE": "9",
        }
        with tempfile.NamedTemporaryFile("r") as file:
            command(**{**environment, "_ARGCOMPLETE_STDOUT_FILENAME": file.name})
            assert expected in file.read()


@pytest.mark.skipif(GPU, reason="is about machines without a GPU")
def test_bench_without_a_gpu_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 2
    assert "needs a GPU" in capsys.readouterr().err


class Wrong(triton_bn.BatchNorm2d):
    """Off by 1e-4 in one of its results."""

    what = ""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.what == "dx":
            input = _Scaled.apply(input)
        y: Tensor = super().forward(input, residual)
        if self.what == "y":
            y = y * (1 + 1e-4)
        if self.training and self.what.startswith("running"):
            getattr(self, self.what).data.mul_(1 + 1e-4)  # PyTorch keeps the buffers for backward
        return y


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * (1 + 1e-4)


@pytest.fixture
def wrong(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Puts the wrong layer in the place of ours; on PyTorch's operators, as that is fast."""

    def place(what: str) -> None:
        monkeypatch.setattr(Wrong, "what", what)
        monkeypatch.setattr(digits, "BatchNorm2d", Wrong)
        monkeypatch.setitem(check.LAYERS, 4, (Wrong, torch.nn.BatchNorm2d))
        monkeypatch.setattr(route, "on_gpu", lambda x: x.is_cuda)

    return place


class TestCheck:
    ARGUMENTS = ("check", "16,3,5,5", "--dtype", "float32")

    def test_ours_is_within_the_bounds(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["check", "7,3,2,5", "9x4"]) == 0
        out = capsys.readouterr().out
        assert "(7, 3, 2, 5) channels_last" in out
        assert out.endswith("72 results within what their dtype may lose, 0 beyond it\n")
        assert main(["check", "9x4", "--dtype", "float32", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert [row["result"] for row in rows] == list(check.HEADERS)
        assert all(row["right"] and row["shape"] == [9, 4] for row in rows)

    @pytest.mark.skipif(GPU, reason="is about machines without a GPU")
    def test_it_runs_the_kernels(self) -> None:
        """Nothing tells it to use the interpreter."""
        ran = command("check", "9x4", "--dtype", "float32")
        assert ran.returncode == 0, ran.stderr
        assert "the kernels in Triton's interpreter" in ran.stdout

    @pytest.mark.parametrize("what", ["y", "dx", "running_mean", "running_var"])
    def test_a_wrong_layer_fails(
        self, what: str, wrong: Callable[[str], None], capsys: pytest.CaptureFixture[str]
    ) -> None:
        wrong(what)
        assert main(self.ARGUMENTS) == 1
        assert "0 beyond it" not in capsys.readouterr().out


class TestDemo:
    def test_it_runs_the_kernels_and_draws(self, tmp_path: Path) -> None:
        """Nothing tells it to use the interpreter: without a GPU it must find that out itself."""
        picture = tmp_path / "picture.png"
        ran = command(*SHORT_DEMO, "--output", str(picture))
        assert ran.returncode == 0, ran.stdout + ran.stderr
        assert ("Triton's interpreter" in ran.stdout) == (not GPU)
        for text in ("test accuracy", "bn_block", "channels_last", "agree"):
            assert text in ran.stdout
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_its_tables_as_json(
        self, wrong: Callable[[str], None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        wrong("y")
        assert main([*SHORT_DEMO, "--json", "--output", str(tmp_path / "picture.png")]) == 1
        found = json.loads(capsys.readouterr().out)
        assert not found["agree"]
        assert len(found["loss"]["ours"]) == len(found["loss"]["torch"]) == 2
        assert "y" in {row["result"] for row in found["worst"] if row["ours"] > 1}

    @pytest.mark.parametrize("what", ["y", "dx", "running_mean", "running_var"])
    def test_a_wrong_layer_fails(
        self,
        what: str,
        wrong: Callable[[str], None],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        wrong(what)
        assert main([*SHORT_DEMO, "--output", str(tmp_path / "picture.png")]) == 1
        out = capsys.readouterr().out
        assert "DISAGREE" in out
        assert f"{what} of bn_stem (contiguous)" in out

    def test_it_names_the_extra_that_it_needs(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setitem(sys.modules, "sklearn", None)
        assert main(SHORT_DEMO) == 2
        assert 'pip install "triton_bn[demo]"' in capsys.readouterr().err

    def test_a_missing_folder_is_said_before_the_work(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*SHORT_DEMO, "--output", str(tmp_path / "no" / "picture.png")]) == 2
        assert "no folder" in capsys.readouterr().err

    @pytest.mark.skipif(os.name == "nt", reason="has no SIGINT to send")
    def test_ctrl_c_ends_it_without_a_traceback(self, tmp_path: Path) -> None:
        process = subprocess.Popen(
            [sys.executable, "-m", "triton_bn", "demo", "--output", str(tmp_path / "picture.png")],
            cwd=Path(__file__).parent.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert process.stdout is not None
        process.stdout.readline()  # it has begun
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 130
        assert "Traceback" not in errors


def test_sparkline_has_a_block_for_each_share() -> None:
    assert demo.sparkline([0.0, 1.0], 8) == "▁█"
    assert demo.sparkline([1.0] * 5, 3) == "▁▁▁"
    assert len(demo.sparkline([float(i) for i in range(100)], 24)) == 24
