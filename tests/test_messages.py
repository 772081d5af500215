"""What a person is told: how a model prints, errors in words, and the logger."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import triton_bn
from triton_bn.plan import DEVICES, candidates
from triton_bn.problem import describe

search = importlib.import_module("triton_bn.tuning.search")
memory = importlib.import_module("triton_bn.tuning.memory")

X = torch.arange(24.0).reshape(2, 3, 4)


def test_a_printed_model_tells_our_layers_from_pytorchs() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    stock = str(model)
    converted = str(triton_bn.convert(model, fuse=False))
    assert converted == stock.replace("BatchNorm2d", "triton_bn.BatchNorm2d")
    assert str(triton_bn.revert(model)) == stock


@pytest.mark.parametrize(
    ("activation", "suggestion"),
    [
        ("ReLU", 'activation="relu"'),
        ("LeakyReLU", 'triton_bn.Activation("leaky_relu", parameter)'),
        ("swish", 'activation="silu"'),
        (nn.ReLU(), 'activation="relu"'),
        (nn.Hardswish, 'activation="hardswish"'),
        (nn.ELU(0.5), 'triton_bn.Activation("elu", parameter)'),
        (F.gelu, 'activation="gelu"'),
    ],
    ids=str,
)
def test_an_activation_written_otherwise_is_told_the_right_form(
    activation: Any, suggestion: str
) -> None:
    with pytest.raises(ValueError, match="activation must be None") as caught:
        triton_bn.BatchNorm2d(3, activation=activation)
    assert suggestion in str(caught.value).partition(": write ")[2]


@pytest.mark.parametrize("activation", ["softplus", nn.PReLU(), nn.SELU(), 3])
def test_one_that_there_is_not_gets_no_suggestion(activation: Any) -> None:
    with pytest.raises(ValueError, match="activation must be None") as caught:
        triton_bn.BatchNorm2d(3, activation=activation)
    assert "write" not in str(caught.value)


def _layer() -> triton_bn.BatchNorm1d:
    return triton_bn.BatchNorm1d(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: _layer()(X, residual=1.0), TypeError, "'residual' must be Tensor, not float"),
        (
            lambda: triton_bn.functional.batch_norm(X, None, None, training=True, residual=True),
            TypeError,
            "'residual' must be Tensor, not bool",
        ),
        (lambda: _layer().plan((1, 2)), TypeError, "'input' must be Tensor, not tuple"),
        (lambda: _layer().plan(X[:, :2]), RuntimeError, "should contain 2 elements not 3"),
        (lambda: _layer().plan(X[:1, :, :1]), ValueError, "more than 1 value per channel"),
        (lambda: _layer().plan(X, device="K80"), ValueError, "H100"),
        (lambda: triton_bn.convert(None), TypeError, "Module, but got NoneType"),
        (lambda: triton_bn.revert(None), TypeError, "Module, but got NoneType"),
        (lambda: triton_bn.conversion_report([]), TypeError, "Module, but got list"),
        (lambda: triton_bn.tune(None), TypeError, "Module, but got NoneType"),
    ],
)
def test_a_wrong_argument_is_named_in_words(
    call: Callable[[], Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        call()
    assert message in str(caught.value)


def test_a_wrong_residual_changes_nothing() -> None:
    layer = _layer()
    with pytest.raises(TypeError):
        layer(X, 1.0)
    assert layer.num_batches_tracked == 0
    assert not layer.running_mean.any()


def test_a_plan_can_be_asked_for_a_gpu_by_name_or_architecture() -> None:
    layer = triton_bn.BatchNorm2d(64)
    x = torch.empty(32, 64, 56, 56, device="meta")
    assert layer.plan(x, device="h100").device == layer.plan(x, device="sm_90").device
    assert layer.plan(x, device="H100").device == DEVICES["H100"]
    assert layer.plan(x, device=DEVICES["MI300X"]).device.arch == "gfx942"


@pytest.mark.parametrize(
    ("shape", "training", "reason"),
    [
        ((32, 64, 56, 56), True, "do not fit into a resident program"),
        ((32, 256, 7, 7), True, "below 16,384 a processor"),
        ((32, 64, 14, 14), False, "nothing to wait for"),
        ((32, 4096, 14, 14), True, "processors busy"),
        ((64, 64, 14, 14), True, "less than 90%"),
    ],
)
def test_a_plan_names_the_threshold_that_decided(
    shape: tuple[int, ...], training: bool, reason: str
) -> None:
    layer = triton_bn.BatchNorm2d(shape[1], device="meta").train(training)
    plans = layer.plan(torch.empty(shape, device="meta"), device="H200")
    assert reason in plans.forward.why
    assert f"why: {plans.forward.why}" in str(plans)
    assert plans.as_rows()[0]["why"] == plans.forward.why


def test_the_logger_says_what_is_converted_and_what_is_left(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Mine(nn.BatchNorm1d):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input

    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.ReLU(), Mine(3))
    with caplog.at_level(logging.INFO, logger="triton_bn"):
        triton_bn.revert(triton_bn.convert(model))
    assert "1: BatchNorm1d becomes triton_bn.BatchNorm1d, fused with relu" in caplog.text
    assert "3: left: " in caplog.text
    assert "reverted a Sequential" in caplog.text


def test_the_logger_says_what_is_searched_found_and_refused(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_BN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(memory, "memo", {})
    problem, _ = describe(torch.empty(32, 64, 7, 7, device="meta"), training=True)
    refused = candidates(problem, DEVICES["H200"])[-1]

    class Run:
        def __call__(self) -> None:
            pass

        def observe(self) -> None:
            pass

        def wrong(self) -> str:
            return ""

    def trial(problem: Any, plan: Any, device: Any) -> Run:
        if plan == refused:
            raise RuntimeError("out of shared memory")
        return Run()

    with caplog.at_level(logging.INFO, logger="triton_bn"):
        search.search(
            problem, DEVICES["H200"], progress=False, trial=trial, timer=lambda run, n: [1.0] * n
        )
    assert f"searching on NVIDIA H200: {problem}" in caplog.text
    assert "out of shared memory" in caplog.text
    assert "1.0000" in caplog.text


def test_nothing_is_logged_unasked() -> None:
    assert logging.getLogger("triton_bn").level == logging.NOTSET
    assert not logging.getLogger("triton_bn").handlers
