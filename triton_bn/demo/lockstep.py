"""A layer of ours beside torch's, in lock-step: at every training step both are given the same.

Two networks that train side by side drift apart, as any two orders of adding floats make them. So
a :class:`Witness` takes what one layer was given in a step (input, residual, parameters, running
statistics, the gradient of its output) to torch's layer, in float32 and in float64. What ours made
of it may differ from the latter by what :mod:`triton_bn.oracle` says that float32 loses, and no
more.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from triton_bn.modules import BatchNorm2d
from triton_bn.oracle import Bounded, batch_norm, observe

__all__ = ["Difference", "Witness", "separate"]


class Difference(NamedTuple):
    """The worst of one result.

    ``absolute`` is how far ours is from torch's in float32. ``ours`` and ``theirs`` are how far
    each is from torch's in float64, as multiples of what float32 may lose.
    """

    absolute: float
    ours: float
    theirs: float


@dataclass
class Step:
    """What a layer was given and what it made of it."""

    x: Tensor
    residual: Tensor | None
    running_mean: Tensor
    running_var: Tensor
    dy: Tensor
    found: dict[str, Tensor]


def separate(layer: nn.BatchNorm2d) -> Callable[[Tensor, Tensor | None], Tensor]:
    """Batch norm, addition and ReLU as torch computes them: three operations."""

    def call(x: Tensor, residual: Tensor | None) -> Tensor:
        y = layer(x)
        return F.relu(y if residual is None else y + residual)

    return call


class Witness:
    """Keeps the last training step of a layer with ReLU, called as ``layer(x, residual)``."""

    def __init__(self, layer: BatchNorm2d) -> None:
        self.layer = layer
        self.step: Step | None = None
        layer.register_forward_pre_hook(self._before)
        layer.register_forward_hook(self._after)
        layer.register_full_backward_hook(self._gradients)

    def _before(self, layer: nn.Module, inputs: tuple[Tensor, Tensor | None]) -> None:
        if layer.training:
            x, residual = (None if t is None else t.detach() for t in inputs)
            mean, var = self.layer.running_mean, self.layer.running_var
            assert x is not None and mean is not None and var is not None
            self.step = Step(x, residual, mean.clone(), var.clone(), x, {})

    def _after(self, layer: nn.Module, inputs: Any, y: Tensor) -> None:
        if layer.training and self.step is not None:
            self.step.found["y"] = y.detach()

    def _gradients(self, layer: nn.Module, to_input: Any, to_output: Any) -> None:
        assert self.step is not None
        self.step.dy = to_output[0]
        gradients = dict(zip(("dx", "dresidual"), to_input, strict=True))
        self.step.found |= {name: t for name, t in gradients.items() if t is not None}

    def differences(self) -> dict[str, Difference]:
        """By result. To be asked between backward and the optimizer's step."""
        ours, step = self.layer, self.step
        assert step is not None
        after = {
            "dweight": ours.weight.grad,
            "dbias": ours.bias.grad,
            "running_mean": ours.running_mean,
            "running_var": ours.running_var,
        }
        found = step.found | {name: t for name, t in after.items() if t is not None}
        bounds = batch_norm(
            step.x,
            step.running_mean,
            step.running_var,
            ours.weight,
            ours.bias,
            True,
            ours.momentum or 0.0,
            ours.eps,
            residual=step.residual,
            activation="relu",
            dy=step.dy,
        )
        theirs, exact = (self._torch(step, dtype) for dtype in (torch.float32, torch.float64))
        differences = {}
        for name, value in exact.items():
            allowed = Bounded(value.cpu(), bounds[name].bound)
            off = Bounded(theirs[name].double().cpu(), torch.ones(())).ratio(found.get(name))
            differences[name] = Difference(
                off, allowed.ratio(found.get(name)), allowed.ratio(theirs[name])
            )
        return differences

    def _torch(self, step: Step, dtype: torch.dtype) -> dict[str, Tensor]:
        """What torch.nn.BatchNorm2d, addition and ReLU make of the same, in ``dtype``."""
        ours = self.layer
        twin = nn.BatchNorm2d(ours.num_features, ours.eps, ours.momentum, device=step.x.device)
        running = {"running_mean": step.running_mean, "running_var": step.running_var}
        twin.load_state_dict({**ours.state_dict(), **running})
        twin.to(dtype)
        residual = None if step.residual is None else step.residual.to(dtype)
        return observe(separate(twin), twin, step.x.to(dtype), step.dy.to(dtype), residual)
