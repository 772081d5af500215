"""PyTorch's own samples of batch norm: what its test suite runs, with gradients, against PyTorch's results."""

from __future__ import annotations

from typing import Any

import oracle
import pytest
import torch
import torch.nn.functional as F
from oracle import Path
from torch import Tensor

pytest.importorskip("expecttest", reason="torch.testing._internal needs it")

from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import triton_bn
from triton_bn.functional import batch_norm

path = oracle.path

OPERATORS = [op for op in op_db if op.name == "nn.functional.batch_norm"]
MODULES = [
    info
    for info in module_db
    if info.name in ("nn.BatchNorm1d", "nn.BatchNorm2d", "nn.BatchNorm3d")
]
EACH_OPERATOR = pytest.mark.parametrize(
    "op", OPERATORS, ids=lambda op: op.variant_test_name or "default"
)
EACH_MODULE = pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
EACH_DTYPE = pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
)


def double(value: Any) -> Any:
    """A leaf of float64 with the same values, where it is a tensor of floats."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().double().clone().requires_grad_(value.requires_grad)


def assert_agrees(got: Tensor, want: Tensor, dtype: torch.dtype, path: Path, what: str) -> None:
    """Within some roundings of the largest value: gradients are differences of terms of its size."""
    assert got.dtype == dtype, what
    unit = oracle.rounding(dtype, path.interpreted)
    scale = want.abs().max().item() if want.numel() else 0.0
    rtol, atol = (4 * unit, 32 * torch.finfo(torch.float32).eps * max(scale, 1))
    if dtype == torch.float64:
        rtol, atol = 1e-12, 1e-12 * max(scale, 1)
    torch.testing.assert_close(
        got.double(), want, rtol=rtol, atol=atol, msg=lambda m: f"{what}: {m}"
    )


def leaves(values: list[Any]) -> list[Tensor]:
    return [v for v in values if isinstance(v, Tensor) and v.requires_grad]


def gradients(y: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Of inputs, where y's gradient is the same numbers in every dtype."""
    if not inputs:
        return ()
    dy = torch.arange(y.numel(), device=y.device).remainder(7).sub(3).to(y.dtype).reshape(y.shape)
    return torch.autograd.grad(y, inputs, dy)


def test_there_are_samples() -> None:
    assert OPERATORS
    assert len(MODULES) == 3


@EACH_OPERATOR
@EACH_DTYPE
def test_samples_of_the_operator(path: Path, op: Any, dtype: torch.dtype) -> None:
    count = empty = 0
    for sample in op.sample_inputs(path.device, dtype, requires_grad=True):
        args = [sample.input, *sample.args]
        wide = [double(a) for a in args]
        want = F.batch_norm(*wide, **sample.kwargs)
        path.launches.clear()
        got = batch_norm(*args, **sample.kwargs)
        assert_agrees(got, want, dtype, path, "y")
        grads = zip(gradients(got, leaves(args)), gradients(want, leaves(wide)), strict=True)
        for i, (mine, theirs) in enumerate(grads):
            assert_agrees(mine, theirs, dtype, path, f"gradient {i}")
        for mine, theirs in zip(args[1:3], wide[1:3], strict=True):
            if mine is not None:
                assert_agrees(mine, theirs, dtype, path, "running statistics")
        count += 1
        empty += sample.input.numel() == 0
        assert bool(path.launches) == (path.name == "kernels" and sample.input.numel() > 0)
    assert count > empty > 0


@EACH_MODULE
@EACH_DTYPE
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_samples_of_the_layers(path: Path, info: Any, dtype: torch.dtype, training: bool) -> None:
    kind = getattr(triton_bn, info.module_cls.__name__)
    count = 0
    for sample in info.module_inputs_func(
        info, device=path.device, dtype=dtype, requires_grad=True, training=training
    ):
        made, called = sample.constructor_input, sample.forward_input
        twin = (
            info.module_cls(*made.args, **made.kwargs)
            .to(path.device, torch.float64)
            .train(training)
        )
        ours = kind(*made.args, **made.kwargs, device=path.device, dtype=dtype).train(training)
        (x,), (wide,) = called.args, [double(a) for a in called.args]
        path.launches.clear()
        got, want = ours(x), twin(wide)
        assert_agrees(got, want, dtype, path, "y")
        mine = gradients(got, [x, *ours.parameters()])
        theirs = gradients(want, [wide, *twin.parameters()])
        for i, pair in enumerate(zip(mine, theirs, strict=True)):
            assert_agrees(*pair, dtype, path, f"gradient {i}")
        assert bool(path.launches) == (path.name == "kernels" and x.numel() > 0)
        state, expected = ours.state_dict(), twin.state_dict()
        assert list(state) == list(expected)
        for name, tensor in state.items():
            if tensor.is_floating_point():
                assert_agrees(tensor, expected[name], dtype, path, name)
            else:
                assert torch.equal(tensor, expected[name])
        count += 1
    assert count


@EACH_MODULE
def test_error_samples_of_the_layers(path: Path, info: Any) -> None:
    kind = getattr(triton_bn, info.module_cls.__name__)
    samples = info.module_error_inputs_func
    if samples is None:
        pytest.skip("this PyTorch has none")
    errors = samples(
        info, device=path.device, dtype=torch.float32, requires_grad=False, training=True
    )
    for error in errors:
        made, called = (
            error.module_error_input.constructor_input,
            error.module_error_input.forward_input,
        )
        if error.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            with pytest.raises(error.error_type, match=error.error_regex):
                kind(*made.args, **made.kwargs)
        else:
            layer = kind(*made.args, **made.kwargs, device=path.device)
            with pytest.raises(error.error_type, match=error.error_regex):
                layer(*called.args, **called.kwargs)
