"""The kernels by themselves: a training step under plans that are given, with nothing above the verbs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from triton_bn import launch
from triton_bn.plan import Plan
from triton_bn.problem import Activation, describe


def step(
    x: Tensor,
    dy: Tensor,
    forward: Plan,
    backward: Plan | None = None,
    *,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
    momentum: float | None = 0.1,
    eps: float = 1e-5,
) -> dict[str, Tensor]:
    """y, the running statistics as they are afterwards and the gradients, by the oracle's names.

    x (N, C, *) must have its canonical view; without a plan of its own backward runs under forward's.
    The running statistics advance in place.
    """
    act = Activation.of(activation)
    kinds: dict[str, Any] = {
        "training": True,
        "residual": residual is not None,
        "activation": act,
        "bits": act is not None and act.two_slopes and residual is not None,
    }
    problem, given = describe(x, **kinds)
    assert given is x, "a copy would be computed with"
    y, stats, packed = launch.forward(
        problem, forward, x, weight, bias, running_mean, running_var, None, residual, momentum, eps
    )
    kinds["residual"] = residual is not None and act is not None and packed is None
    problem, _ = describe(x, direction="backward", **kinds)
    needs = (True, weight is not None, bias is not None, residual is not None)
    added = residual if kinds["residual"] else None
    affine = weight, bias
    dx, dweight, dbias, dresidual = launch.backward(
        problem, backward or forward, dy, x, stats, *affine, added, packed, needs
    )
    found = {
        "y": y, "running_mean": running_mean, "running_var": running_var,
        "dx": dx, "dweight": dweight, "dbias": dbias, "dresidual": dresidual,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def poisoned() -> Any:
    """Meanwhile memory that is not initialized holds NaN, so that nothing can hide that it was not written."""
    return _Deterministic()


class _Deterministic:
    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True)

    def __exit__(self, *_: object) -> None:
        torch.use_deterministic_algorithms(self.before)
