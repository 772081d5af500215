"""Drop-in layers: each is its ``torch.nn`` twin with ``activation=`` and ``forward(input, residual=None)``."""

from __future__ import annotations


import torch
from torch import Tensor, nn

from triton_bn.functional import _batch_norm
from triton_bn.problem import Activation

__all__ = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class _Fused(nn.modules.batchnorm._BatchNorm):
    """What the layers share. Buffers, parameters, errors and state_dict are those of the twin."""

    activation: Activation | None = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | Activation | None = None,
    ) -> None:
        resolved = Activation.of(activation)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device, dtype, bias=bias
        )
        self.activation = resolved

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """``activation(bn(input) + residual)``: of the input's shape (N, C, *), dtype and memory format."""
        self._check_input_dim(input)
        training = self.training or (self.running_mean is None and self.running_var is None)
        track = self.training and self.track_running_stats
        use_buffers = track or not self.training
        return _batch_norm(
            input,
            self.running_mean if use_buffers else None,
            self.running_var if use_buffers else None,
            self.num_batches_tracked if track else None,
            self.weight,
            self.bias,
            training,
            self.momentum,
            self.eps,
            residual,
            self.activation,
        )

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.activation is None else f"{text}, activation={self.activation}"


class BatchNorm1d(_Fused, nn.BatchNorm1d):
    """``torch.nn.BatchNorm1d`` for (N, C) and (N, C, L), with an activation and a residual behind it."""


class BatchNorm2d(_Fused, nn.BatchNorm2d):
    """``torch.nn.BatchNorm2d`` for (N, C, H, W), with an activation and a residual behind it."""


class BatchNorm3d(_Fused, nn.BatchNorm3d):
    """``torch.nn.BatchNorm3d`` for (N, C, D, H, W), with an activation and a residual behind it."""


