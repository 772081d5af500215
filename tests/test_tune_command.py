"""``python -m triton_bn tune``, with a GPU and kernels that are made up."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from triton_bn.__main__ import main
from triton_bn.commands import tune as tune_command
from triton_bn.plan import DEVICES, Device, candidates
from triton_bn.problem import Activation, Problem, describe
from triton_bn.tuning import cache, memory, resolve, search

GPU = DEVICES["H200"]


def run(*arguments: str) -> int:
    return main(["tune", *arguments])


def batch_norm(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, training: bool, *,
    residual: Tensor | None, activation: str | None,
) -> Tensor:  # fmt: skip
    """Asks for the forward plan of the functional batch norm, and computes next to nothing."""
    act = Activation.of(activation)
    seen, _ = describe(x, training=training, residual=residual is not None, activation=act)
    resolve.resolve(seen, GPU)
    return x * weight.sum().to(x.dtype)


@pytest.fixture(autouse=True)
def empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TRITON_BN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "_warned", set())
    monkeypatch.setattr(memory, "memo", {})


class Idle:
    """A run that does nothing, and nothing wrong."""

    def __call__(self) -> None: ...

    def observe(self) -> None: ...

    def wrong(self) -> str:
        return ""


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[Problem]:
    """A made-up GPU where every plan takes 1 ms; the problems that were timed, in order."""
    problems: dict[Problem, None] = {}

    def trial(problem: Problem, plan: object, device: Device) -> object:
        problems[problem] = None
        return Idle()

    monkeypatch.setattr(search, "_launch_trial", trial)
    monkeypatch.setattr(search, "_compiled", lambda *_, **__: {})
    monkeypatch.setattr(search, "time_cold", lambda run, n: [1.0] * n)
    monkeypatch.setattr(tune_command, "batch_norm", batch_norm)
    monkeypatch.setattr(tune_command, "_gpu", lambda: torch.device("cpu"))
    monkeypatch.setattr(Device, "current", staticmethod(lambda device: GPU))
    return problems  # type: ignore[return-value]


@pytest.mark.parametrize("arguments", [[], ["8,16"], ["--export", "file.json"]])
def test_without_a_gpu_it_says_what_it_needs_and_what_can_be_seen(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run(*arguments) == 2
    message = capsys.readouterr().err
    assert "must see a GPU" in message
    assert "python -m triton_bn inspect" in message


def test_shapes_are_tuned_as_they_are_called(
    searched: list[Problem], capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = ["2,16,3,5", "2x8x3x5"]
    options = ["--dtype", "float16", "--channels-last", "--activation", "silu", "--residual"]
    assert run(*shapes, *options) == 0
    first, second = searched
    assert (first.outer, first.channels, first.inner) == (30, 16, 1)
    assert (second.outer, second.channels, second.inner) == (30, 8, 1)
    assert (first.dtype, str(first.activation), first.residual) == (torch.float16, "silu", True)
    output = capsys.readouterr().out
    assert str(first) in output
    assert str(memory.table_path(GPU)) in output


def test_the_default_is_resnet50(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = argparse.ArgumentParser()
    tune_command.add_arguments(parser)
    cases = tune_command._cases(parser.parse_args(["--batch", "4"]))
    assert cases == tune_command._cases(parser.parse_args(["--model", "resnet50", "--batch", "4"]))
    assert cases[0] == tune_command.Case((4, 64, 112, 112), "relu", False)


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_models_shapes_are_those_of_its_architecture(name: str) -> None:
    """Stages halve the image in their first block, by the 3x3 convolution, and double the width."""
    expected = {(64, 112, "relu")}
    for stage in range(4):
        width, size = 64 << stage, 56 >> stage
        if name == "resnet18":
            blocks = [(width, size, "relu"), (width, size, "add relu")]
            shortcut = [(width, size, "")] if stage else []
        else:
            before = size * 2 if stage else size
            blocks = [(width, before, "relu"), (width, size, "relu"), (4 * width, size, "add relu")]
            shortcut = [(4 * width, size, "")]
        expected |= {*blocks, *shortcut}
    assert set(tune_command.MODELS[name]) == expected
    assert len(tune_command.MODELS[name]) == len(expected)


def test_every_candidate_is_printed_and_written_when_asked(
    searched: list[Problem], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("64,32,7,7", "--json") == 0
    (problem,) = searched
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    assert len(rows) == len(candidates(problem, GPU)) > 1
    assert "kept in" in captured.err
    assert run("64,32,7,7", "--table", "--again") == 0
    output = capsys.readouterr().out
    assert output.count("split:") + output.count("resident:") == len(rows)


def test_tables_go_out_and_come_in_without_timing(
    searched: list[Problem],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    table = str(tmp_path / "table.json")
    assert run("--export", table) == 2
    assert "nothing was tuned yet" in capsys.readouterr().err
    assert run("64,32,7,7", "--export", table) == 0
    assert "1 plans exported" in capsys.readouterr().out
    (problem,) = searched
    monkeypatch.setenv("TRITON_BN_CACHE_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(tune_command, "_gpu", lambda: None)
    assert run("--import", table) == 0
    monkeypatch.setattr(memory, "memo", {})
    assert resolve.resolve(problem, GPU).source == "disk"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["8,16", "--channels-last"], "4 or 5 sizes"),
        (["--model", "resnet18", "--activation", "relu"], "without a shape"),
        (["8,16", "--batch", "4"], "without --model"),
        (["--export", "file.json", "--table"], "without something to tune"),
        (["--import", "no/such/file.json"], "no/such/file.json"),
    ],
)
def test_a_failure_is_a_line_not_a_traceback(
    searched: list[Problem],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    assert run(*arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["8"], ["--batch", "0"], ["--model", "vgg"], ["--budget", "-1"]]
)
def test_nonsense_is_a_usage_error(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        run(*arguments)


def test_ctrl_c_prints_what_was_found(
    searched: list[Problem],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = []

    def timer(run: object, n: int) -> list[float]:
        calls.append(n)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return [1.0] * n

    monkeypatch.setattr(search, "time_cold", timer)
    assert run("64,32,7,7") == 130
    captured = capsys.readouterr()
    assert "(incomplete)" in captured.out
    assert "interrupted" in captured.err
    assert memory.table_path(GPU).exists()
